"""A checkpoint of a tiny network on the toy world's latents, written as training writes it, beside
the network that it holds.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rcm.nets.wan.model import WanDiT
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.rollout.recipe import SamplingRecipe
from rcm.train.checkpoint import Checkpointer
from rcm.train.describe import Description
from rcm.train.ema import EMAConfig
from rcm.train.optim import AdamWConfig, LambdaLinear
from rcm.train.state import TrainState
from rcm.worlds.toy_codec import ToyCodec
from rcm.worlds.toy_text import ToyTextEncoder
from tests.support.tiny_nets import tiny_net

LATENT_SHAPE = (24, 6, 4, 4)
PROMPT = "a red circle moving left"
STUDENT = SamplingRecipe("few_step", "c3-3", mids=((15 / 16, 5 / 6), (5 / 6,)))
TEACHER = SamplingRecipe("ode", "c1-1", ode_steps=2, guidance=2.0)
MANY_STEP = WholeVideoRecipe("ode", sigma_max=80.0, steps=3, shift=5.0, guidance=2.0)
FEW_STEP = WholeVideoRecipe("rcm_few_step", sigma_max=80.0, steps=2)
CODEC, TEXT = ToyCodec(), ToyTextEncoder(text_len=8, text_dim=24)


def world_net(*, seed: int = 0) -> WanDiT:
    """The network of the checkpoint: float32, no zero anywhere."""
    return tiny_net(seed=seed, dtype=torch.float32, in_dim=24, out_dim=24, dim=32, num_heads=2, ffn_dim=48, max_frames=16)


def describe_world(net: WanDiT, recipe: SamplingRecipe | WholeVideoRecipe, /, **extra: Any) -> Description:
    """What a run of the toy world says about such a network; `extra` replaces entries."""
    causal = isinstance(recipe, SamplingRecipe)
    known = {
        "recipe": recipe.to_dict() if causal else None,
        "sampler": None if causal else asdict(recipe),
        "codec": {"name": "toy", **asdict(CODEC)},
        "text": {"name": "toy", **asdict(TEXT)},
        "latent_shape": list(LATENT_SHAPE),
        "fps": 8,
        "precision": {"compute": "float32", "time": "float32"},
    }
    return Description(
        stage="sf_dmd" if causal else "rcm",
        network=asdict(net.config),
        network_name="tiny",
        pattern=recipe.pattern if causal else None,
        extra={**known, **extra},
    )


def write_checkpoint(job: Path, recipe: SamplingRecipe | WholeVideoRecipe = STUDENT, *, net: WanDiT | None = None, **extra: Any) -> WanDiT:
    """Save `net` in `job` through the trainer's checkpointer, its average shifted from it, and
    return it.
    """
    net = net or world_net()
    roles = {"student": AdamWConfig(lr=1e-3)}
    state = TrainState.create({"student": net}, optim=roles, schedule=LambdaLinear(warm_up_steps=1), ema=EMAConfig())
    for value in state.ema.shadow.values():
        value.mul_(1.01)
    state.iteration = 7
    Checkpointer(job, dims=ParallelDims(), description=describe_world(net, recipe, **extra)).save(state)
    return net
