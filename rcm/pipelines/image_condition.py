"""What Wan's bidirectional image-to-video networks are told of the first frame: mask channels and the latents of image + grey frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from rcm.core.errors import ConfigError
from rcm.encoders.codec import LatentCodec
from rcm.pipelines.video_io import VideoError
from rcm.pipelines.wan_sizes import FrameSize

MASK_CHANNELS = 4
"""One per pixel frame of a latent frame (temporal stride 4)."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Told by content, not by name. Pillow's others include EPS, which it hands to Ghostscript: a program inside a picture would run."""


def read_image(path: str | Path) -> torch.Tensor:
    """Pixels uint8 [H, W, 3] of an image file, turned upright as its EXIF says, 16-bit grey scaled to 8; `VideoError` names a file that is
    missing, unreadable, or of 32-bit pixels, whose range nobody states.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"no image file at {path}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode in ("I", "F"):
                raise VideoError(f"{path} holds 32-bit pixels of no stated range; convert it to 8 bits")
            upright = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # PIL would clip at 255 instead: a white picture
                upright = Image.fromarray(((np.asarray(upright).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
            return torch.from_numpy(np.array(upright.convert("RGB")))
    except VideoError:
        raise
    except Exception as error:  # a decoder's; Pillow's raise many kinds for damaged files
        raise VideoError(f"cannot decode {path}: {error}") from error


def image_size(image: torch.Tensor) -> FrameSize:
    """Size of pixels [H, W, 3]."""
    return FrameSize(image.shape[0], image.shape[1])


def fit_image(image: torch.Tensor, size: FrameSize) -> torch.Tensor:
    """Pixels uint8 [H, W, 3] stretched (bilinear, antialiased; nothing is cut) to `size`: float32 [1, 3, 1, height, width] in [-1, 1]."""
    pixels = image.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    fitted = torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return fitted.clamp(-1, 1).unsqueeze(2)


def image_channels(codec: LatentCodec, frame: torch.Tensor, *, num_frames: int) -> torch.Tensor:
    """The 20 extra input channels [1, 4 + C, T, h, w] of a video of `num_frames` pixel frames that begins with `frame` [1, 3, 1, H, W].

    First the mask, 1 on latent frame 0; then the latents of the frame followed by frames of zeros (mid grey). spec/wan 7. float32, on the
    device of `frame`. `ConfigError` for a codec of another temporal stride, or a number of frames that does not fold.
    """
    if codec.temporal_stride != MASK_CHANNELS:
        raise ConfigError(
            f"the mask has a channel per pixel frame of a latent frame, {MASK_CHANNELS}; the codec folds {codec.temporal_stride} frames"
        )
    latent_frames = codec.latent_frames_for(num_frames)
    grey = frame.new_zeros(()).expand(*frame.shape[:2], num_frames - 1, *frame.shape[3:])
    latents = codec.encode(torch.cat([frame, grey], dim=2)).float()
    mask = latents.new_zeros(latents.shape[0], MASK_CHANNELS, latent_frames, *latents.shape[3:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)
