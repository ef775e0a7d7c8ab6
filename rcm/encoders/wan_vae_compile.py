"""Compiles the Wan decoder's kernels before the first frame, while weights are being read."""

from __future__ import annotations

import torch

from rcm.encoders.codec import latent_grid
from rcm.encoders.wan_vae_net import SPATIAL_STRIDE, WanVAE, WanVAEConfig
from rcm.kernels.precompile import Compiled, precompile


def compile_decoder(
    device: torch.device | str,
    *,
    size: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    config: WanVAEConfig | None = None,
    batch: int = 1,
    frames_per_step: int = 1,
    threads: int | None = None,
) -> Compiled:
    """Compile what decoding a video of `size` = (H, W) pixels on `device` launches: its first
    frame, and steps of `frames_per_step` latent frames. Needs no weights. Nothing is done where the
    decoder has no kernels of its own (CPU).
    """
    if torch.device(device).type != "cuda":
        return Compiled()
    cells = latent_grid(*size, stride=SPATIAL_STRIDE)
    with torch.device("meta"):
        vae = WanVAE(config).to(dtype)

    def plan() -> None:
        with torch.device("meta"), torch.no_grad():
            state = vae.decoder_state(batch=batch, cells=cells)
            for frames in (1, frames_per_step):
                vae.decode_step(
                    torch.empty(batch, frames, *cells, vae.config.latent_channels, dtype=dtype),
                    state,
                )

    return precompile(plan, device=device, threads=threads)
