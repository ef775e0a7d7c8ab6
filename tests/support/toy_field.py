"""A small nonlinear velocity field with non-trivial dependence on x, on time, and across channels
and frames.
"""

from __future__ import annotations

import torch


class ToyField:
    """fn(x [B, C, T, H, W] float64, t [B, 1] or [B, T]) -> same shape; C and T are `size`. Smooth,
    so every derivative exists.
    """

    def __init__(self, *, seed: int, size: int = 3) -> None:
        g = torch.Generator().manual_seed(100 + seed)
        self.channels, self.frames, self.time = (torch.randn(size, size, generator=g, dtype=torch.float64) for _ in range(3))

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("dc,bcfhw->bdfhw", self.channels, torch.tanh(x))
        mixed = mixed + torch.einsum("gf,bcfhw->bcghw", self.frames, torch.sin(x))
        modulation = 1 + torch.einsum("cd,bfd->bcf", self.time, torch.stack([torch.sin(3 * t), torch.cos(2 * t), t**2], -1))
        return mixed * modulation[..., None, None]
