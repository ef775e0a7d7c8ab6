"""Tiny Wan networks and inputs for tests: float64, every parameter non-trivial (also the output
head), everything from a seed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rcm.diffusion.blocks import BlockPattern
from rcm.nets.condition import Condition
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.model import WanDiT

GRID = (2, 3)
HEIGHT, WIDTH = 4, 6
PATTERNS = {"c1-1": 4, "c3-3": 6, "c1-4": 9}
"""Pattern name to a number of frames with at least two blocks."""


def tiny_config(**changes) -> WanConfig:
    """A configuration of 2 layers, 4 heads of 16; keyword changes as fields of `WanConfig`."""
    base = WanConfig(dim=64, ffn_dim=96, num_heads=4, num_layers=2, in_dim=4, out_dim=4, freq_dim=16, text_dim=24, text_len=8, image_dim=40)
    return replace(base, **changes)


def tiny_net(*, seed: int = 0, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes) -> WanDiT:
    """A network whose parameters are all drawn from `seed`: no zero head, no trivial norm weight,
    no zero bias.
    """
    net = WanDiT(tiny_config(**changes), attention=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if name.endswith("bias") or "modulation" in name:
                p.copy_(0.3 * draw)
            elif p.dim() == 1:
                p.copy_(1 + 0.3 * draw)
            else:
                p.copy_(1.3 * draw * p.shape[1] ** -0.5)
    return net.to(dtype)


def latents(frames: int, *, batch: int = 2, channels: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Latents [batch, channels, frames, HEIGHT, WIDTH]."""
    return torch.randn(batch, channels, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def condition(config: WanConfig, *, batch: int = 2, length: int = 5, seed: int = 2, dtype: torch.dtype = torch.float64) -> Condition:
    """Text of `length` tokens (padded by the network), and image tokens where the network has that
    branch.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, length, config.text_dim, generator=generator, dtype=torch.float64).to(dtype)
    if not config.image_branch:
        return Condition(text)
    return Condition(text, image=torch.randn(batch, 7, config.image_dim, generator=generator, dtype=torch.float64).to(dtype))


def frame_times(frames: int, *, batch: int = 2, seed: int = 3) -> Tensor:
    """Timesteps [batch, frames] in 0..1000, float64, different for every frame."""
    return 1000 * torch.rand(batch, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pattern(name: str) -> BlockPattern:
    """Block pattern by name."""
    return BlockPattern.parse(name)
