"""Small Wan autoencoders for tests: the full depth at a few channels, random weights with gammas
away from 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_weights import diffusers_name

BASE_DIM = 8
CELLS = (4, 6)
# keeps random pictures inside [-1, 1], where peers that clamp can be compared
QUIET_HEAD = 0.1


def small_codec(*, dtype: torch.dtype = torch.float32, seed: int = 3, tile: int | None = None) -> WanVAECodec:
    """A codec of base_dim 8 whose decoder's last convolution is small."""
    codec = WanVAECodec.random(dtype=dtype, seed=seed, base_dim=BASE_DIM, tile=tile)
    with torch.no_grad():
        codec.vae.decoder.head["2"].weight.mul_(QUIET_HEAD)
        codec.vae.decoder.head["2"].bias.mul_(QUIET_HEAD)
    return codec


def small_latents(frames: int = 5, *, batch: int = 1, seed: int = 0, cells: tuple[int, int] = CELLS, dtype=torch.float32) -> torch.Tensor:
    """Whitened latents [B, 16, T, *cells]."""
    return torch.randn(batch, 16, frames, *cells, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_video(frames: int = 9, *, batch: int = 1, seed: int = 1, cells: tuple[int, int] = CELLS, dtype=torch.float32) -> torch.Tensor:
    """Pixels [B, 3, F, 8 h, 8 w] in [-1, 1]."""
    size = (batch, 3, frames, 8 * cells[0], 8 * cells[1])
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under diffusers' names (AutoencoderKLWan)."""
    return {diffusers_name(key): value for key, value in state.items()}
