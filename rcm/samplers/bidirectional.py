"""Whole-video sampling with a velocity function: the many-step teacher and the bidirectional
few-step student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
    noise (the many-step teacher).
    """

    times: tuple[float, ...]
    rule: StepRule
    scale_first: bool = False

    def sample(
        self, velocity: Velocity, noise: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `Sampler`."""
        return sample_video(
            velocity,
            noise,
            times=self.times,
            rule=self.rule,
            generator=generator,
            scale_first=self.scale_first,
        )


def sample_video(
    velocity: Velocity,
    noise: Tensor,
    *,
    times: Sequence[float],
    rule: StepRule,
    generator: torch.Generator | None = None,
    scale_first: bool = True,
) -> Tensor:
    """Walk a whole video along `times` (decreasing, last 0) with one rule.

    `velocity(x, t)` returns v for x [B, C, T, H, W] at RF time t. `noise` is the unit Gaussian
    start; the state keeps its dtype (use float64). `scale_first` starts from times[0] * noise
    (few-step samplers); off starts from the unscaled noise (the many-step teacher). `generator`
    draws one renoising tensor per step of a rule that renoises, in order; also at the last step,
    where its weight is 0, as the release does, so that a generator used for several videos stays in
    step with it.
    """
    x = noise * times[0] if scale_first else noise
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity(x, t)
        require_same_shape(x=x, velocity=v)
        fresh = None
        if rule.needs_noise:
            fresh = torch.randn(
                x.shape, generator=generator, dtype=torch.float32, device=_device(generator, x)
            ).to(x)
        x = rule(x, v, t=t, t_next=t_next, noise=fresh)
    return x


def _device(generator: torch.Generator | None, x: Tensor) -> torch.device:
    return generator.device if generator is not None else x.device
