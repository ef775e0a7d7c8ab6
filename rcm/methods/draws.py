"""Random draws of a training step, each keyed by its purpose, placed on the latents' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rcm.core.rng import StepRng, randn
from rcm.diffusion.time_sampling import TimeLaw


def draw_noise(
    rng: StepRng, purpose: str, shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Unit Gaussian float32 tensor of `shape` on `device`."""
    return randn(shape, generator=rng.generator(purpose), device=device)


def draw_times(
    rng: StepRng, purpose: str, law: TimeLaw, *, batch: int, device: torch.device
) -> torch.Tensor:
    """One RF time per sample: float64 [batch, 1] on `device`."""
    return law.sample((batch, 1), generator=rng.generator(purpose)).to(device)


def draw_end_times(
    rng: StepRng, purpose: str, t: torch.Tensor, *, equal_share: float
) -> torch.Tensor:
    """Second times s <= t, shaped as `t`: t itself with probability `equal_share`, else uniform on
    [0, t] (as the earlier of two uniform draws is, given the later).
    """
    generator = rng.generator(purpose)
    chosen, ratio = torch.rand(
        2, *t.shape, generator=generator, device=generator.device, dtype=torch.float64
    ).to(t.device)
    return torch.where(chosen < equal_share, t, ratio * t)
