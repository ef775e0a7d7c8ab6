"""A policy, a condition and a backbone of one's own, each as docs/extending.md says: nothing in
`rcm` knows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcm.data.batch import LatentBatch
from rcm.nets.condition import Condition
from rcm.nets.denoiser import VelocityModel
from rcm.nets.kv_cache import KVCache
from rcm.nets.wan.model import WanDiT
from rcm.rollout.eviction.base import CachePolicy, ChunkSpan, Placement


@dataclass(frozen=True)
class Thinning(CachePolicy):
    """Of the past every `every`-th block stays, and the newest."""

    every: int = 3

    def before(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> Placement:
        """See `CachePolicy`."""
        dropped = [held.id for held in branches[0].chunks[:-1] if held.id % self.every]
        for cache in branches:
            cache.evict(dropped)
        return super().before(branches, chunk)


@dataclass(frozen=True)
class Steered(Condition):
    """Text and an action per latent frame, `actions` [B, T, A]."""

    actions: Tensor | None = None


@dataclass(frozen=True)
class SteeredBatch(LatentBatch):
    """Latents with actions."""

    actions: Tensor | None = None

    def condition(self) -> Steered:
        """See `LatentBatch`."""
        return Steered(self.text, actions=self.actions)


class SteeredDiT(WanDiT):
    """Wan with a learnt offset of the latents per action."""

    def steer_by(self, width: int) -> SteeredDiT:
        """Make the layer for actions of `width` numbers; returns itself."""
        self.steer = nn.Linear(width, self.config.in_dim, bias=False, dtype=self.patch_embedding.weight.dtype)
        return self

    def forward(self, x, timestep, cond, layout, cache=None, **options):
        """See `WanDiT`; a packed input takes each frame's action by its position."""
        offset = self.steer(cond.actions)[:, list(layout.frame_index)]
        moved = x + offset.movedim(-1, 1)[..., None, None]
        return super().forward(moved, timestep, cond, layout, cache, **options)


class Mixer(VelocityModel):
    """The least of a backbone that trains and samples whole videos: velocity, a grid of tokens, and
    `net`, whose parameters are trained.
    """

    def __init__(self, channels: int) -> None:
        self.net = nn.Linear(channels + 1, channels, dtype=torch.float64)

    def velocity(self, x, t, cond, layout, *, cache=None):
        """A linear map of channels and time."""
        time = t[:, None, :, None, None].to(x.dtype).expand(-1, 1, *x.shape[2:])
        return self.net(torch.cat([x, time], dim=1).movedim(1, -1)).movedim(-1, 1)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """A token is two pixels wide and high."""
        return height // 2, width // 2
