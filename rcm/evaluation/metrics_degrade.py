"""Known harm to real clips, at three strengths, to see which metrics notice: what a judge must rank
below the untouched clip.

Every function takes a source clip of at least `SOURCE_FRAMES` frames [F, 3, H, W] in [0, 1] and a
strength 0, 1 or 2, and returns `CLIP_FRAMES` frames. Random choices come from a seed of (kind,
strength).
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rcm.core.errors import ConfigError
from rcm.pipelines.video_io import read_mp4, write_mp4

CLIP_FRAMES, SOURCE_FRAMES = 32, 44
STRENGTHS = (0, 1, 2)


def untouched(source: Tensor) -> Tensor:
    """The clip that all others are compared with: the first frames."""
    if source.shape[0] < SOURCE_FRAMES:
        raise ConfigError(f"a source clip has {source.shape[0]} frames, {SOURCE_FRAMES} are needed")
    return source[:CLIP_FRAMES]


def blur(source: Tensor, strength: int) -> Tensor:
    """Gaussian blur of 0.8, 1.5 or 3 pixels."""
    sigma = (0.8, 1.5, 3.0)[strength]
    reach = round(3 * sigma)
    axis = torch.arange(-reach, reach + 1, dtype=source.dtype)
    line = torch.exp(-axis.square() / (2 * sigma**2))
    line = (line / line.sum()).expand(3, 1, -1)
    clip = functional.pad(untouched(source), (reach,) * 4, mode="replicate")
    return functional.conv2d(
        functional.conv2d(clip, line[:, :, None], groups=3), line[..., None], groups=3
    )


def freeze(source: Tensor, strength: int) -> Tensor:
    """A frame held for 4, 8 or 12 frames in the middle, then the clip goes on where it would be."""
    held, clip = (4, 8, 12)[strength], untouched(source).clone()
    clip[10 : 10 + held] = clip[10]
    return clip


def flicker(source: Tensor, strength: int) -> Tensor:
    """Brightness of every frame changed by up to 2, 5 or 10 percent, at random."""
    draw = torch.Generator().manual_seed(_seed("flicker", strength))
    gain = 1 + (0.02, 0.05, 0.1)[strength] * (2 * torch.rand(CLIP_FRAMES, generator=draw) - 1)
    return (untouched(source) * gain[:, None, None, None]).clamp(0, 1)


def colour_drift(source: Tensor, strength: int) -> Tensor:
    """Red gained and blue lost evenly over the clip: 5, 10 or 20 percent at its end."""
    ramp = torch.linspace(0, (0.05, 0.1, 0.2)[strength], CLIP_FRAMES)
    gain = torch.stack([1 + ramp, torch.ones_like(ramp), 1 - ramp], dim=1)
    return (untouched(source) * gain[:, :, None, None]).clamp(0, 1)


def chunk_jump(source: Tensor, strength: int) -> Tensor:
    """From frame 16 on the picture is 2, 4 or 8 % of its width further right, and darker."""
    share, clip = (0.02, 0.04, 0.08)[strength], untouched(source).clone()
    shift = max(1, round(share * clip.shape[3]))
    later = functional.pad(clip[16:], (shift, 0, 0, 0), mode="replicate")[..., : clip.shape[3]]
    clip[16:] = later * (1 - share)
    return clip


def dropped_chunk(source: Tensor, strength: int) -> Tensor:
    """4, 8 or 12 frames left out after frame 16."""
    lost = (4, 8, 12)[strength]
    return torch.cat([source[:16], source[16 + lost :]])[:CLIP_FRAMES]


def repeated_chunk(source: Tensor, strength: int) -> Tensor:
    """The last 4, 8 or 12 frames before frame 16 shown once more."""
    again = (4, 8, 12)[strength]
    return torch.cat([source[:16], source[16 - again :]])[:CLIP_FRAMES]


def compression(source: Tensor, strength: int) -> Tensor:
    """Through x264 at a constant rate factor of 33, 40 or 47; others go through no codec."""
    clip = untouched(source)
    with tempfile.TemporaryDirectory() as folder:
        path = write_mp4(
            Path(folder) / "clip.mp4",
            clip.permute(1, 0, 2, 3) * 2 - 1,
            fps=16,
            crf=(33, 40, 47)[strength],
            pad=True,
        )
        read = read_mp4(path)
    return ((read + 1) / 2).permute(1, 0, 2, 3)[:, :, : clip.shape[2], : clip.shape[3]].contiguous()


def noise(source: Tensor, strength: int) -> Tensor:
    """White noise of 2, 5 or 12 grey levels (of 255), new in every frame."""
    clip = untouched(source)
    generator = torch.Generator().manual_seed(_seed("noise", strength))
    return (clip + (2, 5, 12)[strength] / 255 * torch.randn(clip.shape, generator=generator)).clamp(
        0, 1
    )


_IN_TIME = (freeze, flicker, colour_drift, chunk_jump, dropped_chunk, repeated_chunk)
DEGRADATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    harm.__name__: harm for harm in (blur, *_IN_TIME, compression, noise)
}


def _seed(kind: str, strength: int) -> int:
    return zlib.crc32(f"{kind} {strength}".encode())
