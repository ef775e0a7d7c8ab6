"""An invertible latent codec: space-time blocks of pixels, rotated by an orthonormal cosine
transform and scaled per frequency.

The first pixel frame is a latent frame of its own (repeated in time, so that only its temporal mean
differs from zero); each later latent frame holds `temporal_stride` frames. Every pixel lands in
exactly one latent cell, hence decoding is exact and needs no memory of other frames. Why a
transform: raw pixels of a block are almost equal, so their channels would be almost copies of each
other. The rotation puts the picture into the mean channels and leaves edges and flicker to the
others; `boost` lifts those towards unit size without giving flat noise the weight of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.encoders.codec import StridedSizes


def cosine_basis(size: int) -> list[list[float]]:
    """Rows of the orthonormal DCT-II of `size` points; for 2 the Haar transform."""
    return [
        [
            math.sqrt((1 if k == 0 else 2) / size) * math.cos(math.pi * (n + 0.5) * k / size)
            for n in range(size)
        ]
        for k in range(size)
    ]


def _rotate(parts: tuple[Tensor, ...], rows: list[list[float]]) -> list[Tensor]:
    """sum_n rows[k][n] * parts[n] for every k, elementwise: bits do not depend on the batch."""
    out = []
    for row in rows:
        total = parts[0] * row[0]
        for part, weight in zip(parts[1:], row[1:], strict=True):
            total = total + part * weight
        out.append(total)
    return out


@dataclass(frozen=True)
class ToyCodec(Record, StridedSizes):
    """A `LatentCodec` of temporal_stride * spatial_stride**2 * 3 channels.

    Latent = gain * boost**n * coefficient of (pixel - centre), n = how many of (time, height,
    width) have a frequency other than zero. The defaults fit the default `ToyWorld`: the ground is
    zero and the root mean square of latents is near 1.7, since a small network that predicts
    velocity learns the picture sooner when it outweighs the noise; `NATURAL` fits photographs, with
    mean channels near 1. Encoding float32 and decoding returns the pixels within 1e-6.
    """

    temporal_stride: int = within(2, above=0)
    spatial_stride: int = within(2, above=0)
    gain: float = within(3.0, above=0)
    boost: float = within(1.0, above=0)
    centre: float = -0.9

    @property
    def latent_channels(self) -> int:
        return 3 * self.temporal_stride * self.spatial_stride**2

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] of `video` [B, 3, F, H, W] in [-1, 1], in its dtype."""
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ConfigError(
                "toy codec encodes floats [B, 3, F, H, W] in [-1, 1], got"
                f" {video.dtype} {tuple(video.shape)}"
            )
        self.latent_frames_for(video.shape[2])
        self.latent_size(video.shape[3], video.shape[4])
        first = video[:, :, :1].repeat_interleave(self.temporal_stride, dim=2)
        blocks = torch.cat([first, video[:, :, 1:]], dim=2) - self.centre
        parts = [blocks]
        for dim, stride in self._axes():
            parts = [q for p in parts for q in _rotate(_deal(p, dim, stride), cosine_basis(stride))]
        return torch.cat([p * g for p, g in zip(parts, self._gains(), strict=True)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of latents [B, C, T, h, w] that begin a video."""
        return self._decode(latents, begins=True)

    def _decode(self, latents: Tensor, *, begins: bool) -> Tensor:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or not latents.shape[2]:
            raise ConfigError(
                f"toy codec decodes [B, {self.latent_channels}, T, h, w], got"
                f" {tuple(latents.shape)}"
            )
        parts = [p / g for p, g in zip(latents.split(3, dim=1), self._gains(), strict=True)]
        for dim, stride in reversed(self._axes()):
            rows = [list(column) for column in zip(*cosine_basis(stride), strict=True)]
            parts = [
                _interleave(_rotate(tuple(parts[i : i + stride]), rows), dim)
                for i in range(0, len(parts), stride)
            ]
        video = parts[0] + self.centre
        if not begins:
            return video
        first = video[:, :, : self.temporal_stride].mean(dim=2, keepdim=True)
        return torch.cat([first, video[:, :, self.temporal_stride :]], dim=2)

    def stream(self) -> ToyStream:
        """A fresh streaming decoder."""
        return ToyStream(self)

    def _axes(self) -> list[tuple[int, int]]:
        return [(2, self.temporal_stride), (3, self.spatial_stride), (4, self.spatial_stride)]

    def _gains(self) -> list[float]:
        t, s = range(self.temporal_stride), range(self.spatial_stride)
        return [
            self.gain * self.boost ** ((i > 0) + (j > 0) + (k > 0)) for i in t for j in s for k in s
        ]


NATURAL = ToyCodec(gain=0.9, boost=2.0, centre=0.0)
"""The codec for real clips, whose pixels spread evenly around grey and whose edges are faint."""


class ToyStream:
    """Streaming decoder of one video: only the first latent frame ever given is the lone one."""

    def __init__(self, codec: ToyCodec) -> None:
        self._codec, self._begins = codec, True

    def decode_chunk(self, latents: Tensor) -> Tensor:
        """Pixels of the next latent frames, bit for bit those of `ToyCodec.decode` of all."""
        frames = self._codec._decode(latents, begins=self._begins)
        self._begins = False
        return frames

    def state_copy(self) -> bool:
        """Whether the video begins: all there is to remember."""
        return self._begins

    def load_state(self, state: bool) -> None:
        self._begins = state

    def num_bytes(self) -> int:
        return 0


def _deal(x: Tensor, dim: int, stride: int) -> tuple[Tensor, ...]:
    """Split an axis into its `stride` interleaved parts."""
    return x.unflatten(dim, (-1, stride)).unbind(dim + 1)


def _interleave(parts: list[Tensor], dim: int) -> Tensor:
    """Inverse of `_deal`."""
    return torch.stack(parts, dim=dim + 1).flatten(dim, dim + 1)
