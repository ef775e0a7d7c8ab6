"""The update runs on this rank's shards: the numbers of torch's AdamW, states sharded as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rcm.train.optim import AdamWConfig
from tests.support.dist import run_ranks

CONFIG = AdamWConfig(lr=1e-2)


class Updates(TorchDispatchMode):
    """Kinds of tensors that the optimiser's kernel is dispatched for."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[type] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "adam" in str(func):
            self.kinds |= {type(tensor) for tensor in args[0]}
        return func(*args, **(kwargs or {}))


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
    with Updates() as seen:
        for step in range(3):
            for p, q in zip(net.parameters(), whole, strict=True):
                q.grad = torch.linspace(-1, step, q.numel()).view_as(q)
                p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
            seen.kinds.clear()
            optimizer.step()
            kinds = set(seen.kinds)
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
