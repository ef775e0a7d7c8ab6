"""What Wan's bidirectional image-to-video networks are told of a first (and a last) frame: mask
channels, latents of images and grey.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from rcm.core.errors import ConfigError
from rcm.encoders.codec import LatentCodec
from rcm.pipelines.video_io import VideoError
from rcm.pipelines.wan_sizes import FrameSize

MAX_PIXELS = 128 * 10**6

MASK_CHANNELS = 4
"""One per pixel frame of a latent frame (temporal stride 4)."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Told by content, not by name. Pillow's others include EPS, which it hands to Ghostscript: a
program inside a picture would run.
"""


def read_image(path: str | Path) -> torch.Tensor:
    """Pixels uint8 [H, W, 3] of a still image: upright as its EXIF says, transparent parts over
    white, 16-bit grey scaled to 8.

    `VideoError` names a file that is missing, cut off, of another format than `FORMATS`, animated,
    larger than `MAX_PIXELS`, or of 32-bit pixels, whose range nobody states.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise VideoError(f"no image file at {path}")
        with warnings.catch_warnings():
            # the size is looked at here; a damaged EXIF turns nothing
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                return _pixels(image, path)
    except VideoError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise VideoError(f"cannot decode {path}: {told}") from error


def _pixels(image: Image.Image, path: Path) -> torch.Tensor:
    if image.width * image.height > MAX_PIXELS:
        raise VideoError(
            f"{path} has {image.width}x{image.height} pixels, at most {MAX_PIXELS // 10**6} million"
            " are read; scale it down"
        )
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1 and image.format != "MPO":  # a photograph with a preview
        raise VideoError(
            f"{path} holds {pictures} pictures, an animation or pages; give one still image,"
            " or a video file"
        )
    if image.mode in ("I", "F"):
        raise VideoError(f"{path} holds 32-bit pixels of no stated range; convert it to 8 bits")
    upright = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would clip at 255 instead: a white picture
        upright = Image.fromarray(
            ((np.asarray(upright).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        )
    if upright.has_transparency_data:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return torch.from_numpy(np.array(upright.convert("RGB")))


def image_size(image: torch.Tensor) -> FrameSize:
    """Size of pixels [H, W, 3]."""
    return FrameSize(image.shape[0], image.shape[1])


def fit_image(image: torch.Tensor, size: FrameSize) -> torch.Tensor:
    """Pixels uint8 [H, W, 3] stretched (bilinear, antialiased; nothing is cut) to `size`: float32
    [1, 3, 1, height, width] in [-1, 1].
    """
    pixels = image.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    fitted = torch.nn.functional.interpolate(
        pixels, size=tuple(size), mode="bilinear", antialias=True, align_corners=False
    )
    return fitted.clamp(-1, 1).unsqueeze(2)


def image_channels(
    codec: LatentCodec, frame: torch.Tensor, *, num_frames: int, last: torch.Tensor | None = None
) -> torch.Tensor:
    """The 20 extra input channels [1, 4 + C, T, h, w] of a video of `num_frames` pixel frames that
    begins with `frame` [1, 3, 1, H, W] and ends with `last`, if given.

    First the mask, 1 on latent frame 0, and on the pixel frame of `last` (the fourth channel of the
    last latent frame); then the latents of the given frames with frames of zeros (mid grey) between
    or behind. docs/reference/wan.md#image-condition. float32, on the device of `frame`.
    `ConfigError` for a codec of another temporal stride, a number of frames that does not fold, or
    one frame to begin and to end.
    """
    if codec.temporal_stride != MASK_CHANNELS:
        raise ConfigError(
            f"the mask has a channel per pixel frame of a latent frame, {MASK_CHANNELS}; the codec"
            f" folds {codec.temporal_stride} frames"
        )
    latent_frames = codec.latent_frames_for(num_frames)
    if last is not None and latent_frames < 2:
        raise ConfigError(
            f"a first and a last frame need at least {1 + MASK_CHANNELS} frames, got {num_frames};"
            " change --num_frames"
        )
    ends = [] if last is None else [last]
    grey = frame.new_zeros(()).expand(
        *frame.shape[:2], num_frames - 1 - len(ends), *frame.shape[3:]
    )
    latents = codec.encode(torch.cat([frame, grey, *ends], dim=2)).float()
    mask = latents.new_zeros(latents.shape[0], MASK_CHANNELS, latent_frames, *latents.shape[3:])
    mask[:, :, 0] = 1
    if last is not None:
        mask[:, -1, -1] = 1
    return torch.cat([mask, latents], dim=1)
