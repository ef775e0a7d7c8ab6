"""FlexAttention's block tables say what the mask says; one compilation on the CPU, the rest through
torch's eager form.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing
from rcm.nets import attention_flex
from rcm.nets.attention_dense import Reference
from rcm.nets.attention_flex import BLOCK, Flex, block_mask
from tests.support.tiny_nets import pattern

MASKS = {
    "full blocks": TeacherForcing(pattern("c1-1"), 2, 256),
    "odd blocks": TeacherForcing(pattern("c3-3"), 6, 54),
    "window": TeacherForcing(pattern("c1-4"), 9, 45, window=2, sinks=1),
    "noisy": TeacherForcing(pattern("c1-1"), 4, 150, queries="noisy"),
    "offset": BlockCausal(pattern("c1-1"), 7, 50, q_block_offset=3, window=2, sinks=1),
}
CPU = torch.device("cpu")


def inputs(mask) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, 2, 16, generator=generator) for n in (mask.q_len, mask.kv_len, mask.kv_len)]


def in_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[rows, columns, BLOCK, BLOCK], padded with False where a sequence ends: such a block is an
    edge, as in torch's own tables.
    """
    rows, columns = (-(-size // BLOCK) for size in matrix.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.bool)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(rows, BLOCK, columns, BLOCK).transpose(1, 2)


@pytest.mark.parametrize("name", MASKS)
def test_tables_and_rule_equal_the_mask(name):
    mask = MASKS[name]
    truth, found = mask.dense(), block_mask(mask, CPU)
    cells = in_blocks(truth)
    inside = torch.zeros_like(truth)
    for row in range(cells.shape[0]):
        full = found.full_kv_indices[0, 0, row, : found.full_kv_num_blocks[0, 0, row]].tolist()
        partial = found.kv_indices[0, 0, row, : found.kv_num_blocks[0, 0, row]].tolist()
        assert not set(full) & set(partial)
        assert all(cells[row, column].all() for column in full)
        for column in full + partial:
            inside[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = True
        exact = [c for c in range(cells.shape[1]) if truth[row * BLOCK : (row + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK].any()]
        assert sorted(full + partial) == exact, "no block without a visible pair, none forgotten"
    assert bool((inside >= truth).all())
    q_index, kv_index = torch.arange(mask.q_len)[:, None], torch.arange(mask.kv_len)[None]
    assert torch.equal(found.mask_mod(None, None, q_index, kv_index), truth)
    assert block_mask(mask, CPU) is found


def test_whole_blocks_need_no_rule():
    found = block_mask(MASKS["full blocks"], CPU)
    assert not found.kv_num_blocks.any()
    assert found.full_kv_num_blocks.flatten().tolist() == [2, 2, 4, 4, 2, 2, 4, 4]


@pytest.mark.parametrize("name", MASKS)
def test_values_equal_the_reference(name, monkeypatch):
    monkeypatch.setattr(attention_flex, "_compiled", lambda: flex_attention)
    mask = MASKS[name]
    q, k, v = inputs(mask)
    torch.testing.assert_close(Flex()(q, k, v, mask=mask, scale=0.3), Reference()(q, k, v, mask=mask, scale=0.3), rtol=1e-5, atol=1e-5)


def test_masks_without_effect_become_no_mask(monkeypatch):
    seen = []
    monkeypatch.setattr(attention_flex, "_compiled", lambda: lambda q, k, v, **options: seen.append(options) or q)
    q, k, v = inputs(Full(10, 10))
    for mask in (None, Full(10, 10)):
        Flex("triton")(q, k, v, mask=mask, scale=0.3)
    assert seen == 2 * [{"block_mask": None, "scale": 0.3, "kernel_options": {"BACKEND": "TRITON"}}]


@pytest.mark.slow
def test_compiled_values_equal_the_reference():
    """The compiled kernel reads the block tables, which torch's eager form ignores."""
    for name in ("window", "offset"):
        q, k, v = inputs(MASKS[name])
        with torch.no_grad():
            got = Flex()(q, k, v, mask=MASKS[name], scale=0.3)
        torch.testing.assert_close(got, Reference()(q, k, v, mask=MASKS[name], scale=0.3), rtol=1e-5, atol=1e-5)


def test_what_it_refuses():
    q, k, v = inputs(MASKS["offset"])
    with pytest.raises(ConfigError, match="'flex' has no gradient on cpu.*choose attention_backend / RCM_ATTENTION_BACKEND from auto"):
        Flex()(q.requires_grad_(), k, v, mask=MASKS["offset"], scale=0.3)
    with pytest.raises(RuntimeError, match="'flex_triton' cannot run inside a tangent pass"):
        jvp(lambda y: y * Flex("triton")(k, k, v, mask=None, scale=0.3).sum(), (q.detach(),), (q.detach(),))
    with pytest.raises(ConfigError, match="unknown kernel 'cuda' for FlexAttention; set flex_backend / RCM_FLEX_BACKEND"):
        Flex("cuda")
