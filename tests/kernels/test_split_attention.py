"""Attention in parts along the keys: the merge against whole attention in float64, the kernel
against the merge, the number of parts.
"""

from __future__ import annotations

import pytest
import torch

from rcm.kernels.split_attention.api import merge_reference, num_splits, split_attention
from tests.support.in_interpreter import in_interpreter


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_merged_parts_are_the_whole(scale):
    q, k, v = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (5, 11, 12))
    k = scale * k
    v = v[:, :11]
    scores = torch.einsum("bqnd,bknd->bnqk", q, k)
    whole = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)
    cuts = (slice(0, 4), slice(4, 9), slice(9, 11))
    outputs = [torch.einsum("bnqk,bknd->bnqd", scores[..., cut].softmax(-1), v[:, cut]) for cut in cuts]
    torch.testing.assert_close(merge_reference(outputs, [scores[..., cut].logsumexp(-1) for cut in cuts]), whole, rtol=0, atol=1e-12)


def test_merging_kernels_in_the_interpreter():
    for kernel in in_interpreter("interpreted_merge").values():
        assert kernel["kernel"] < 1e-5
        assert min(kernel["mutants"].values()) > 0.05


def test_parts_fill_the_last_round():
    """132 processors: 1,560 queries of 12 heads are 156 tiles, two rounds for one and a fifth; long
    enough keys are cut. The numbers were the fastest on an H200.
    """
    assert [num_splits(1560, n, 12, 132) for n in (4680, 32760)] == [2, 5]
    assert [num_splits(4680, n, 12, 132) for n in (9360, 18720, 32760)] == [2, 2, 2]
    assert num_splits(128 * 132, 32760, 12, 132) == 1, "whole rounds: nothing to fill"
    assert num_splits(1560, 3000, 12, 132) == 1, "too few keys to cut"


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_split_equals_whole_on_the_card(parts):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a card of compute capability 9.0")
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, n, 12, 128, generator=draw, device="cuda").bfloat16() for n in (700, 5003, 5003))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    found = [split_attention(q, k, v, scale=128**-0.5, parts=n).double() - exact for n in (parts, 1)]
    assert found[0].norm() <= 1.5 * found[1].norm()
