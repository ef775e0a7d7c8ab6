"""A checkpoint of adapters on another checkpoint of the toy world, written as training writes
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rcm.nets.lora import AdaptedNet, attach
from rcm.nets.wan.adapters import LAYERS
from rcm.parallel.init import load_full
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.wan_files import network_weights
from rcm.pipelines.weight_files import open_weights
from rcm.storage.digest import DigestedWeights
from rcm.train.checkpoint import Checkpointer
from rcm.train.ema import EMAConfig
from rcm.train.optim import AdamWConfig, LambdaLinear
from rcm.train.state import TrainState
from tests.support.tiny_checkpoint import STUDENT, describe_world, world_net

RANK, ALPHA = 2, 2.7
"""An alpha that neither float32 nor bfloat16 holds."""


def write_adapted(job: Path, base: Path, *, seed: int = 5, names: tuple[str, ...] = ("student", "fake_score")) -> AdaptedNet:
    """Save adapters of the roles `names`, no factor zero, on the network at `base`; return the
    student.
    """
    net = world_net()
    attach(net, LAYERS, roles=names, rank=RANK, alpha=ALPHA)
    weights = DigestedWeights(network_weights(open_weights(base)), dtype=torch.float32)
    load_full(AdaptedNet(net, None), weights)
    generator = torch.Generator().manual_seed(seed)
    roles = {role: AdaptedNet(net, role) for role in names}
    with torch.no_grad():
        for view in roles.values():
            for p in view.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    told = {"path": str(base), "dtype": "float32", "digest": weights.digest}
    said: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "layers": list(LAYERS), "bases": dict.fromkeys(roles, told)}
    optim = dict.fromkeys(roles, AdamWConfig(lr=1e-3))
    state = TrainState.create(roles, optim=optim, schedule=LambdaLinear(warm_up_steps=1), ema=EMAConfig())
    for value in state.ema.shadow.values():
        value.mul_(0.9)
    Checkpointer(job, dims=ParallelDims(), description=describe_world(net, STUDENT, adapters=said)).save(state)
    return roles["student"]
