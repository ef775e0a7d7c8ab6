"""The update runs on this rank's shards: the numbers of torch's AdamW, states sharded as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rcm.train.optim import AdamWConfig
from tests.support.dist import run_ranks
from tests.support.watched import Watched

CONFIG = AdamWConfig(lr=1e-2)


def updated() -> dict[str, object]:
    """Three updates of a sharded layer, and of the same layer whole by torch's AdamW."""
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 5)  # five rows: the second rank has fewer
    whole = [p.detach().clone().requires_grad_() for p in net.parameters()]
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    options = {"lr": CONFIG.lr, "weight_decay": CONFIG.weight_decay, "betas": CONFIG.betas}
    oracle, optimizer = (
        torch.optim.AdamW(whole, fused=True, **options),
        CONFIG.build(net.parameters()),
    )
    kinds: set[type] = set()  # of the tensors that the optimiser's kernel is dispatched for

    def see(func, args) -> None:
        if "adam" in str(func):
            kinds.update(map(type, args[0]))

    for step in range(3):
        for p, q in zip(net.parameters(), whole, strict=True):
            q.grad = torch.linspace(-1, step, q.numel()).view_as(q)
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        with Watched(see):
            optimizer.step()
        oracle.step()
    states = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return {
        "same": all(torch.equal(p.full_tensor(), q) for p, q in zip(net.parameters(), whole, strict=True)),
        "sharded": all(isinstance(x, DTensor) for x in states),
        "shards": kinds == {Tensor},
    }


@pytest.mark.dist
def test_shards_are_updated_as_whole_tensors_would_be(tmp_path: Path) -> None:
    for found in run_ranks(2, updated, tmp_path=tmp_path):
        assert found == {"same": True, "sharded": True, "shards": True}
