"""Denoisers with closed-form velocities, for methods: they speak the package's interface and know
nothing of networks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rcm.diffusion.time import per_frame
from rcm.nets.denoiser import VelocityModel
from tests.support.linear_gaussian import LinearGaussian


class _Nothing:
    """A cache that forgets: the closed forms need no context."""

    def append(self):
        return self

    def readonly(self, num_chunks=None, transient=False):
        return self


class AnalyticDenoiser(VelocityModel):
    """velocity = field(x, t) on the output frames of the layout; one scalar parameter adds `offset`
    so that there is something to train.
    """

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.field = field
        self.net = nn.Module()
        self.net.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def velocity(self, x, t, cond, layout, *, cache=None):
        times = per_frame(t, x)
        times = times.expand(-1, -1, x.shape[2], -1, -1)
        start, stop = layout.output
        return self.field(x[:, :, start:stop], times[:, :, start:stop]) + self.net.offset

    def new_cache(self, *, num_frames, grid, keys="post_rope"):
        return _Nothing()

    def token_grid(self, height, width):
        return height // 2, width // 2


def gaussian_pair(world: LinearGaussian) -> tuple[AnalyticDenoiser, AnalyticDenoiser]:
    """(student with the true consistency map, teacher with the true velocity)."""
    return AnalyticDenoiser(world.rf_student), AnalyticDenoiser(world.rf_velocity)
