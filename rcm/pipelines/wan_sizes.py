"""Frame sizes of Wan videos: the table of resolutions, sizes that follow an image's shape, sizes
written by hand. docs/reference/wan.md#frame-sizes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rcm.core.errors import ConfigError

MAX_SIDE = 8192
"""Pixels a side of a frame that is written by hand."""

SIZE_MULTIPLE = 16
"""Pixels per side of a token: 8 by the VAE, 2 by the patch."""


class FrameSize(NamedTuple):
    """Height and width of a frame in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


_WIDTH_HEIGHT = {
    "480p": {
        "1:1": (640, 640),
        "4:3": (640, 480),
        "3:4": (480, 640),
        "16:9": (832, 480),
        "9:16": (480, 832),
    },
    "720p": {
        "1:1": (960, 960),
        "4:3": (960, 720),
        "3:4": (720, 960),
        "16:9": (1280, 720),
        "9:16": (720, 1280),
    },
    "480": {
        "1:1": (480, 480),
        "4:3": (640, 480),
        "3:4": (480, 640),
        "16:9": (768, 432),
        "9:16": (432, 768),
    },
    "512": {
        "1:1": (512, 512),
        "4:3": (640, 512),
        "3:4": (512, 640),
        "16:9": (640, 384),
        "9:16": (384, 640),
    },
    "720": {
        "1:1": (960, 960),
        "4:3": (960, 704),
        "3:4": (704, 960),
        "16:9": (1280, 704),
        "9:16": (704, 1280),
    },
}

SIZES = {
    name: {ratio: FrameSize(h, w) for ratio, (w, h) in row.items()}
    for name, row in _WIDTH_HEIGHT.items()
}
"""Resolution -> aspect ratio (width:height) -> size. "480p" and "720p" are what Wan was trained on,
the others are older tables.
"""


def table_size(resolution: str, aspect_ratio: str) -> FrameSize:
    """The table's size; `ConfigError` lists the choices."""
    if resolution not in SIZES:
        raise ConfigError(
            f"resolution {resolution!r} is not in the table; choose --resolution from"
            f" {', '.join(SIZES)}, or give --size HxW"
        )
    row = SIZES[resolution]
    if aspect_ratio not in row:
        raise ConfigError(
            f"aspect ratio {aspect_ratio!r} is not in the table; choose --aspect_ratio from"
            f" {', '.join(row)}"
        )
    return row[aspect_ratio]


def adaptive_size(area: FrameSize, *, image: FrameSize) -> FrameSize:
    """The size with about the pixels of `area` and the shape of `image`: each ideal side rounded to
    the nearest multiple of 16.

    With A pixels and r = image height / image width: height sqrt(A r), width sqrt(A / r).
    `ConfigError` for an image so long that a side would vanish.
    """
    pixels, ratio = area.height * area.width, image.height / image.width
    sides = [
        SIZE_MULTIPLE * round(ideal**0.5 / SIZE_MULTIPLE)
        for ideal in (pixels * ratio, pixels / ratio)
    ]
    if min(sides) < SIZE_MULTIPLE:
        raise ConfigError(
            f"an image of {image} (HxW) is too long for a video of {pixels} pixels per frame;"
            " crop it"
        )
    return FrameSize(*sides)


def written_size(text: str) -> FrameSize:
    """ "HEIGHTxWIDTH" in pixels; `ConfigError` unless both are positive multiples of 16 (naming the
    nearest ones), at most `MAX_SIDE`.
    """
    match = re.fullmatch(r"\s*0*([0-9]{1,9})\s*[xX]\s*0*([0-9]{1,9})\s*", text)
    if match is None:
        raise ConfigError(f"--size {text[:40]!r} is not HEIGHTxWIDTH in pixels, such as 480x832")
    size = FrameSize(int(match[1]), int(match[2]))
    if max(size) > MAX_SIDE:
        raise ConfigError(
            f"--size {size} (HxW) is too large, at most {MAX_SIDE} pixels a side are sampled"
        )
    if any(side % SIZE_MULTIPLE or not side for side in size):
        nearest = FrameSize(
            *(max(SIZE_MULTIPLE, SIZE_MULTIPLE * round(side / SIZE_MULTIPLE)) for side in size)
        )
        raise ConfigError(
            f"--size {size} (HxW) must be multiples of {SIZE_MULTIPLE} (VAE 8 x patch 2); the"
            f" nearest is {nearest}"
        )
    return size
