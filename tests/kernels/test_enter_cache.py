"""Norms, rotation and cache slots in one kernel, against the formulas; broken kernels are
noticed.
"""

from __future__ import annotations

import pytest
import torch

from rcm.kernels.fused.enter_cache import enter_cache_reference
from rcm.nets.layers import RMSNorm
from rcm.nets.rope import RopeTables, rotate
from tests.support.in_interpreter import in_interpreter


def test_kernel_in_the_interpreter():
    report = in_interpreter("interpreted_enter_cache")
    assert report["kernel"] < 1e-5
    assert min(report["mutants"].values()) > 0.05


@pytest.mark.slow
def test_layers_over_codes_in_the_interpreter():
    """Norms, rotation, encoding and restoring by kernels, restored keys turned as they are written,
    against plain torch.
    """
    report = in_interpreter("interpreted_coded_layer")
    assert len(report) == 16
    assert max(report.values()) < 1e-5, report


def test_formulas_are_those_of_the_layers():
    """The network's own norm and rotation, in float32."""
    projected = tuple(torch.randn(2, 4, 36) for _ in range(3))
    norms = [RMSNorm(36, eps=1e-6) for _ in range(2)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    table = RopeTables(12, max_rows=2, max_columns=2).table((5,), (2, 2), device=torch.device("cpu"), dtype=torch.float32)
    caches, slots = tuple(torch.zeros(2, 9, 3, 12) for _ in range(2)), torch.tensor([6, 7, 0, 1])
    q = enter_cache_reference(projected, tuple(n.weight for n in norms), table.per_pair, slots, caches, eps=1e-6, rotate_keys=True)
    expected = [rotate(norm(x).unflatten(2, (3, 12)), table) for norm, x in zip(norms, projected, strict=False)]
    torch.testing.assert_close(q, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(caches[0][:, slots], expected[1], rtol=0, atol=1e-5)
    assert torch.equal(caches[1][:, slots], projected[2].unflatten(2, (3, 12)))
