"""Given first frames of a video: an image or the start of a clip, encoded as the clean blocks that
a causal network continues.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from rcm.core.errors import ConfigError
from rcm.encoders.codec import LatentCodec
from rcm.pipelines.image_condition import read_image
from rcm.pipelines.video_io import iter_frames, resize_frame

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_image(path: str | Path) -> bool:
    """Whether a file is read as an image (by its suffix); everything else is read as a video."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_first_frames(
    path: str | Path, *, num_frames: int, height: int, width: int
) -> torch.Tensor:
    """The first `num_frames` frames of a video, or an image (one frame): float32 [1, 3, F, height,
    width] in [-1, 1].

    Frames are scaled (antialiased) to cover the size and cut at the centre, as training clips are.
    Raises `VideoError` for a file that cannot be read, `ConfigError` for one with too few frames.
    """
    path = Path(path)
    frames = [read_image(path)] if is_image(path) else list(islice(iter_frames(path), num_frames))
    if len(frames) < num_frames:
        raise ConfigError(
            f"{path} has {len(frames)} frame(s), {num_frames} are needed; give fewer first latent"
            " frames or another file"
        )
    return torch.stack(
        [resize_frame(frame, height=height, width=width) for frame in frames], dim=1
    ).unsqueeze(0)


def first_latents(
    path: str | Path,
    *,
    codec: LatentCodec,
    num_latents: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The first `num_latents` latent frames of a file, [1, C, k, h, w]: the `prefix` of a stream.
    Errors as `read_first_frames`.
    """
    if num_latents < 1:
        raise ConfigError(
            f"{num_latents} first latent frames: at least 1 must be given; change --first_latents"
        )
    frames = codec.frames_for(num_latents)
    if is_image(path) and frames > 1:
        raise ConfigError(
            f"an image is one latent frame, {num_latents} are asked for ({frames} pixel frames);"
            " give a video, or --first_latents 1 and a checkpoint whose first block is one frame"
        )
    return codec.encode(
        read_first_frames(path, num_frames=frames, height=height, width=width).to(device)
    )
