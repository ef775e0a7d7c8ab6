"""Whole-video sampling with a velocity function: the many-step teacher and the bidirectional
few-step student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.diffusion.time import require_same_shape
from rcm.samplers.steps import StepRule

Velocity = Callable[[Tensor, float], Tensor]
"""v = velocity(x, t) for x [B, C, T, H, W] at RF time t, same shape and dtype."""


class Sampler(Protocol):
    """A way from noise to data along fixed times."""

    @property
    def times(self) -> tuple[float, ...]:
        """RF times walked, decreasing to 0: one network evaluation at each but the last."""
        ...

    def sample(
        self, velocity: Velocity, noise: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """x0 from unit Gaussian `noise` [B, C, T, H, W]; the state keeps its dtype (use float64).
        `generator` draws added noise.
        """
        ...


@dataclass(frozen=True)
class SingleStep:
    """The sampler of a rule that needs one velocity per step and remembers nothing.

    `scale_first` starts from times[0] * noise (few-step samplers); off starts from the unscaled
    noise (the many-step teacher). Raises `ConfigError` unless the times decrease to exactly 0.
    """

    times: tuple[float, ...]
    rule: StepRule
    scale_first: bool = False

    def __post_init__(self) -> None:
        require_kind("times", self.times, tuple[float, ...])
        falls = all(a > b for a, b in pairwise(self.times))
        if len(self.times) < 2 or not falls or self.times[-1] != 0:
            raise ConfigError(f"sampling times {self.times} must decrease strictly to exactly 0")

    def sample(
        self, velocity: Velocity, noise: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `Sampler`. `generator` draws one renoising tensor per step of a rule that renoises,
        in order; also at the last step, where its weight is 0, as the release does, so that a
        generator used for several videos stays in step with it.
        """
        x = noise * self.times[0] if self.scale_first else noise
        for t, t_next in pairwise(self.times):
            v = velocity(x, t)
            require_same_shape(x=x, velocity=v)
            fresh = None
            if self.rule.needs_noise:
                fresh = torch.randn(
                    x.shape, generator=generator, dtype=torch.float32, device=_device(generator, x)
                ).to(x)
            x = self.rule(x, v, t=t, t_next=t_next, noise=fresh)
        return x


def _device(generator: torch.Generator | None, x: Tensor) -> torch.device:
    return generator.device if generator is not None else x.device
