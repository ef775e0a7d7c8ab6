"""The Wan2.1 autoencoder as a `LatentCodec`: published weights, videos, streams and tiles.

Shape legend: B batch, C = 16 latent channels, F pixel frames, T latent frames, H W pixel size, h w
latent size. docs/reference/encoders.md#vae-layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rcm.core.errors import ConfigError
from rcm.encoders.network_codec import NetworkCodec
from rcm.encoders.wan_vae_compile import compile_decoder
from rcm.encoders.wan_vae_net import LATENT_CHANNELS, WanVAE, WanVAEConfig
from rcm.encoders.wan_vae_stream import (
    DecodeStream,
    Graphs,
    LatentStatistics,
    TiledDecodeStream,
    decode_in_tiles,
    encode_frames,
    require_latents,
)
from rcm.encoders.wan_vae_tiles import plan_tiles
from rcm.encoders.wan_vae_weights import load_weights
from rcm.kernels.precompile import Compiled

# per channel, of the published network's latents (docs/reference/encoders.md#vae-normalisation)
MEANS: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEANS += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
DEVIATIONS: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
DEVIATIONS += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
DECODE_STEP = 2
ENCODE_STEP = 4


class WanVAECodec(NetworkCodec):
    """A `LatentCodec` around a frozen `WanVAE`, whose dtype is its precision.

    float32 computes all in float32 (no TF32), as the official code does. bfloat16 stores in
    bfloat16, with sums, norms and statistics in float32, and is the fast one. `tile`: side of
    approximate tiles in latent cells (`wan_vae_tiles`), None for whole frames.
    """

    name = "wan_vae"

    def __init__(
        self, vae: WanVAE, *, path: str | Path | None = None, tile: int | None = None
    ) -> None:
        if vae.config.latent_channels != LATENT_CHANNELS:
            raise ConfigError(
                f"latent statistics exist for {LATENT_CHANNELS} channels, the autoencoder has"
                f" {vae.config.latent_channels}"
            )
        if tile is not None:
            plan_tiles((tile, tile), tile=tile, scale=1)
        published = (torch.tensor(x, dtype=torch.float64) for x in (MEANS, DEVIATIONS))
        super().__init__(vae, LatentStatistics(*published), path=path)
        self.tile = tile

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        tile: int | None = None,
    ) -> WanVAECodec:
        """The codec with weights of a file, original or diffusers names (`load_weights`)."""
        require_dtype(dtype)
        with torch.device("meta"):
            vae = WanVAE()
        load_weights(vae, path, device=device, dtype=dtype)
        return cls(vae, path=path, tile=tile)

    @classmethod
    def random(
        cls,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        base_dim: int = 96,
        tile: int | None = None,
    ) -> WanVAECodec:
        """Random weights, drawn in float32 on `device`: for speed tests, pictures are noise."""
        require_dtype(dtype)
        with torch.device("meta"):
            vae = WanVAE(WanVAEConfig(base_dim=base_dim))
        # memory in the final dtype from the start; values are drawn in float32 one tensor at a time
        vae = vae.to(dtype).to_empty(device=device)
        fill_random(vae, seed=seed)
        return cls(vae, tile=tile)

    @property
    def vae(self) -> WanVAE:
        return self.net

    @property
    def captures(self) -> bool:
        """Whether `stream` takes graphs='on': not for tiles."""
        return self.tile is None and super().captures

    def encode(self, video: Tensor, *, frames_per_step: int = ENCODE_STEP) -> Tensor:
        """Whitened latent means [B, 16, T, h, w], float32 or wider, of [B, 3, F, H, W] in [-1, 1].

        Deterministic. One frame, then `frames_per_step` at a time (any multiple of 4 gives the same
        latents), each moved from where `video` is. `ConfigError` for another shape, an F that is
        not 1 + 4 k, an H or W that is no multiple of 8.
        """
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ConfigError(
                "the Wan autoencoder encodes floating [B, 3, F, H, W] in [-1, 1], got"
                f" {video.dtype} {tuple(video.shape)}"
            )
        if frames_per_step < 1 or frames_per_step % self.temporal_stride:
            raise ConfigError(
                f"frames_per_step={frames_per_step} must be a multiple of {self.temporal_stride}"
                " pixel frames"
            )
        frames = self.latent_frames_for(video.shape[2])
        cells = self.latent_size(video.shape[3], video.shape[4])
        if self.tile is None:
            return encode_frames(self.vae, self.statistics, video, frames_per_step=frames_per_step)
        total: Tensor | None = None
        for tile in plan_tiles(cells, tile=self.tile, scale=1):
            rows, columns = (
                slice(s.start * self.spatial_stride, s.stop * self.spatial_stride)
                for s in (tile.rows, tile.columns)
            )
            piece = encode_frames(
                self.vae,
                self.statistics,
                video[..., rows, columns],
                frames_per_step=frames_per_step,
            )
            if total is None:
                total = piece.new_zeros(video.shape[0], self.latent_channels, frames, *cells)
            tile.add(piece, total, scale=1)
        assert total is not None  # there are tiles
        return total

    def decode(self, latents: Tensor, *, frames_per_step: int = DECODE_STEP) -> Tensor:
        """Pixels [B, 3, F, H, W] of whitened latents [B, 16, T, h, w], in their dtype.

        `frames_per_step` latent frames go through at once: more use the card better and take more
        memory; the result is the same up to rounding.
        """
        require_latents(latents, channels=self.latent_channels)
        if self.tile is not None:
            return decode_in_tiles(
                self.vae, self.statistics, latents, tile=self.tile, frames_per_step=frames_per_step
            )
        return self.stream(frames_per_step=frames_per_step).decode_chunk(latents)

    def stream(
        self, *, frames_per_step: int = 1, graphs: Graphs = "off"
    ) -> DecodeStream | TiledDecodeStream:
        """See `NetworkCodec`; tile by tile where the codec is."""
        if self.tile is None:
            return super().stream(frames_per_step=frames_per_step, graphs=graphs)
        if graphs != "off":
            raise ConfigError("graphs='on' is for whole frames; set tile=None or graphs='off'")
        return TiledDecodeStream(
            self.vae, self.statistics, tile=self.tile, frames_per_step=frames_per_step
        )

    def warm_up(
        self, size: tuple[int, int], *, batch: int = 1, frames_per_step: int = 1
    ) -> Compiled:
        """Compile what a `stream` of videos of `size` = (H, W) pixels launches (`compile_decoder`).

        It may run in a thread; `compile_decoder` itself even while the weights are read.
        """
        height, width = (
            min(n, self.tile or n) * self.spatial_stride for n in self.latent_size(*size)
        )
        return compile_decoder(
            self.device,
            size=(height, width),
            dtype=self.dtype,
            config=self.vae.config,
            batch=batch,
            frames_per_step=frames_per_step,
        )


def fill_random(vae: nn.Module, *, seed: int) -> None:
    """Random weights: convolutions keep the size of inputs, gammas 1 +- 0.2, biases +- 0.1."""
    generator = torch.Generator(device=next(vae.parameters()).device).manual_seed(seed)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        if name.endswith("gamma"):
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        with torch.no_grad():
            parameter.copy_(value)


def require_dtype(dtype: torch.dtype) -> None:
    """`ConfigError` unless the autoencoder can run in `dtype`."""
    known = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if dtype not in known:
        told = ", ".join(map(str, known))
        raise ConfigError(f"the autoencoder's dtype is {dtype}, expected one of {told}")
