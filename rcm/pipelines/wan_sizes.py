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


_TABLE = """
      1:1      4:3      3:4      16:9      9:16
480p  640x640  640x480  480x640  832x480   480x832
720p  960x960  960x720  720x960  1280x720  720x1280
480   480x480  640x480  480x640  768x432   432x768
512   512x512  640x512  512x640  640x384   384x640
720   960x960  960x704  704x960  1280x704  704x1280
"""
"""Width x height."""


def _sizes(table: str) -> dict[str, dict[str, FrameSize]]:
    ratios, *rows = (line.split() for line in table.strip().splitlines())
    found: dict[str, dict[str, FrameSize]] = {}
    for name, *row in rows:
        sides = (map(int, cell.split("x")) for cell in row)
        found[name] = {ratio: FrameSize(h, w) for ratio, (w, h) in zip(ratios, sides, strict=True)}
    return found


SIZES = _sizes(_TABLE)
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
