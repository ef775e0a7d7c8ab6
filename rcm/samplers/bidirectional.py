"""Whole-video sampling with a velocity function: the many-step teacher and the bidirectional few-step student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rcm.samplers.steps import StepRule


def sample_video(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    noise: torch.Tensor,
    *,
    times: Sequence[float],
    rule: StepRule,
    generator: torch.Generator | None = None,
    scale_first: bool = True,
) -> torch.Tensor:
    """Walk a whole video along `times` (decreasing, last 0) with one rule.

    `velocity(x, t)` returns v for x [B, C, T, H, W] at RF time t. `noise` is the unit Gaussian start; the state keeps its dtype (use
    float64). `scale_first` starts from times[0] * noise (few-step samplers); off starts from the unscaled noise (the many-step teacher).
    `generator` draws the renoising tensors, one per step that needs one, in order.
    """
    x = noise * times[0] if scale_first else noise
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        fresh = None
        if rule.needs_noise and t_next > 0:
            fresh = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=_device(generator, x)).to(x)
        x = rule(x, velocity(x, t), t=t, t_next=t_next, noise=fresh)
    return x


def _device(generator: torch.Generator | None, x: torch.Tensor) -> torch.device:
    return generator.device if generator is not None else x.device
