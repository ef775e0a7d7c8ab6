"""A head on tokens behind a block, on two ranks as on one: sequences and parameters spread, a pass
that ends at the block, and a gradient for the input alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rcm.core.dtypes import Precision
from rcm.nets.condition import Condition
from rcm.nets.gan_head import GanHead, Taps
from rcm.nets.layout import TokenLayout
from rcm.parallel.apply import parallelize_head
from rcm.parallel.mesh import ParallelDims
from tests.parallel.parallel_probe import BATCH, GRID, T, build, everyone, full, inputs, mine, worst
from tests.support.dist import run_ranks
from tests.support.toy_method import CONFIG

LAYOUT = TokenLayout.bidirectional(T, grid=GRID)


def looked(dims: ParallelDims) -> dict[str, Any]:
    """Logits, and gradients: of a loss for all weights, then of the logits for the input."""
    net, head = build(dims), GanHead(CONFIG.dim, taps=1, hidden=6).double()
    generator = torch.Generator().manual_seed(1)
    for p in head.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    parallelize_head(head, dims=dims, precision=Precision.preset("fp64"))
    x = mine(inputs("x", T), dims).requires_grad_()
    t, cond = (
        mine(torch.linspace(50, 950, BATCH, dtype=torch.float64).view(-1, 1), dims),
        Condition(mine(inputs("text", 1).flatten(1)[:, :24].view(BATCH, 3, 8), dims)),
    )
    logits = head(net(x, t, cond, LAYOUT, taps=Taps((0,), alone=True))[1])
    F.softplus(-logits).mean().backward()
    found: dict[str, Any] = {"logits": everyone(logits.detach(), dims), "input": everyone(x.grad, dims) / dims.num_data_ranks}
    for name, module in (("net", net), ("head", head)):
        found[name] = {key: full(p.grad).clone() for key, p in module.named_parameters() if p.grad is not None}
        module.zero_grad()
    v, tokens = net(x, t, cond, LAYOUT, taps=Taps((0,)))
    (pull,) = torch.autograd.grad(head(tokens).sum(), x)
    assert not any(p.grad is not None for module in (net, head) for p in module.parameters())
    return found | {"pull": everyone(pull, dims), "v": everyone(v.detach(), dims)}


@pytest.mark.dist
def test_two_ranks_look_like_one(tmp_path: Path) -> None:
    truth = looked(ParallelDims())
    assert not any(key.startswith("blocks.1") for key in truth["net"]), "no block runs behind the one that is read"
    for dims in (ParallelDims(1, 1, 2), ParallelDims(1, 2, 1)):
        for found in run_ranks(2, looked, dims, tmp_path=tmp_path):
            assert worst(found, truth) < 1e-11, dims
