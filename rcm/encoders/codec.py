"""What the rest of the package asks of a video codec: causal in time, chunkable, with whitened
latents.

Shape legend: B batch, C latent channels, F pixel frames, T latent frames, H W pixel size, h w
latent size.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.diffusion.blocks import BlockPattern


@runtime_checkable
class LatentStream(Protocol):
    """A decoder in the middle of one video: it remembers what the codec needs of earlier chunks."""

    def decode_chunk(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, f, H, W] of the next latent frames; all chunks together are `decode`."""

    def state_copy(self) -> Any:
        """A copy of what is remembered, for a snapshot."""

    def load_state(self, state: Any) -> None:
        """Go on from a `state_copy` of this stream or of one opened alike."""

    def num_bytes(self) -> int:
        """Bytes that are remembered on the device."""


@runtime_checkable
class LatentCodec(Protocol):
    """Video in [-1, 1] to latents and back. The first pixel frame is a latent frame of its own;
    each further one covers `temporal_stride` frames.
    """

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame after the first."""

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell along height and width."""

    @property
    def latent_channels(self) -> int:
        """C."""

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] (float32 or wider) of `video` [B, 3, F, H, W] in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of latents [B, C, T, h, w]; whoever writes a file clamps."""

    def latent_frames_for(self, num_frames: int) -> int:
        """T of `num_frames` = 1 + k * temporal_stride pixel frames, or `ConfigError`."""

    def frames_for(self, num_latent_frames: int) -> int:
        """F of `num_latent_frames` latent frames."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of a frame; `ConfigError` unless both are multiples of spatial_stride."""

    def stream(self) -> LatentStream:
        """A fresh streaming decoder, for one video (or one batch of videos in step)."""


class StridedSizes:
    """How a `LatentCodec` counts frames and cells, whose strides are numbers of its own."""

    temporal_stride: int
    spatial_stride: int

    def latent_frames_for(self, num_frames: int) -> int:
        return latent_frames(num_frames, stride=self.temporal_stride)

    def frames_for(self, num_latent_frames: int) -> int:
        if num_latent_frames < 1:
            raise ConfigError(f"a video has at least one latent frame, got {num_latent_frames}")
        return 1 + (num_latent_frames - 1) * self.temporal_stride

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return latent_grid(height, width, stride=self.spatial_stride)


def latent_frames(num_frames: int, *, stride: int) -> int:
    """T = 1 + (F - 1) / stride; `ConfigError` for a remainder names the nearest lengths."""
    if num_frames < 1 or (num_frames - 1) % stride:
        below = max(0, num_frames - 1) // stride * stride + 1
        raise ConfigError(
            f"{num_frames} frames do not fold with temporal_stride={stride} (first frame alone,"
            f" then groups of {stride}); choose num_frames={below} or {below + stride}"
        )
    return 1 + (num_frames - 1) // stride


def latent_grid(height: int, width: int, *, stride: int) -> tuple[int, int]:
    """(h, w) = (H, W) / stride; `ConfigError` when either does not divide."""
    if height % stride or width % stride or height < stride or width < stride:
        raise ConfigError(
            f"frame size {height}x{width} (HxW) does not fold with spatial_stride={stride}; choose"
            f" multiples of {stride}"
        )
    return height // stride, width // stride


MOST_FRAMES = 1_000_000
"""Pixel frames of a video of known length, whose plan is made up front: 17 hours."""


def fold_frames(num_frames: int, *, codec: LatentCodec, pattern: BlockPattern | None) -> int:
    """Latent frames of a video of `num_frames` pixel frames. `ConfigError`, naming the nearest
    lengths, unless the codec folds them and, with a pattern, they fill its blocks.
    """
    require_kind("num_frames", num_frames, int)
    if pattern is None:
        return codec.latent_frames_for(num_frames)
    if num_frames > MOST_FRAMES:
        raise ConfigError(f"num_frames={num_frames} must be at most {MOST_FRAMES}")
    latents = 1 + -(-(num_frames - 1) // codec.temporal_stride)
    blocks = 1 + max(0, -(-(latents - pattern.first) // pattern.chunk))
    length = codec.frames_for(pattern.frames_before(blocks))
    if length == num_frames:
        return pattern.frames_before(blocks)
    below = [] if blocks == 1 else [codec.frames_for(pattern.frames_before(blocks - 1))]
    raise ConfigError(
        f"num_frames={num_frames} does not fit latent blocks of {pattern.first}, then"
        f" {pattern.chunk} frames (pattern {pattern.name}) with {codec.temporal_stride} pixel"
        f" frames per latent frame; choose num_frames={' or '.join(map(str, [*below, length]))}"
    )
