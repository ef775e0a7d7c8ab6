"""The noise a rollout consumes: one full-video tensor per step index, sliced by frames (spec/causal_inference 2)."""

from __future__ import annotations

import torch

from rcm.rollout.plan import ChunkPlan


class VideoNoise:
    """All noise of one video, drawn up front in a fixed order: start, then one tensor per further draw.

    `shape` [B, C, T, H, W]; draws are float32 on the generator's device, handed out in `dtype` on `device`. Step j of every chunk reads
    draw j
    (sliced to the chunk's frames); the release draws the step noises after the start noise, whether or not the last is used: `num_draws`
    is the number of step tensors. Context noise (re-noised commits) is drawn on demand from the same generator.
    """

    def __init__(
        self, shape: tuple[int, ...], *, num_draws: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device(device)
        self._generator = generator
        self._draws = [self._draw(self.shape) for _ in range(num_draws + 1)]

    @classmethod
    def for_plans(
        cls, plans: tuple[ChunkPlan, ...], shape: tuple[int, ...], *, generator, dtype, device, renoises: bool = True
    ) -> VideoNoise:
        """Noise for `plans`; `renoises` False (ODE) draws the start only."""
        num = max(plan.num_steps for plan in plans) if renoises else 0
        return cls(shape, num_draws=num, generator=generator, dtype=dtype, device=device)

    def start(self, frames: slice) -> torch.Tensor:
        """Unit noise a chunk starts from, [B, C, frames, H, W]."""
        return self._draws[0][:, :, frames].to(self.device, self.dtype)

    def step(self, index: int, frames: slice) -> torch.Tensor:
        """Unit noise used when leaving step `index` (0-based) of a chunk."""
        return self._draws[index + 1][:, :, frames].to(self.device, self.dtype)

    def context(self, frames: slice) -> torch.Tensor:
        """Fresh noise for a re-noised context of these frames."""
        batch, channels, _, height, width = self.shape
        return self._draw((batch, channels, frames.stop - frames.start, height, width)).to(self.device, self.dtype)

    def _draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device, dtype=torch.float32)
