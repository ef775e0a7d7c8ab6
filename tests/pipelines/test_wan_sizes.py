"""Frame sizes of the table, of an image, and written by hand."""

from __future__ import annotations

import pytest

from rcm.core.errors import ConfigError
from rcm.pipelines.wan_sizes import SIZES, FrameSize, adaptive_size, table_size, written_size


@pytest.mark.parametrize(
    ("resolution", "ratio", "size"),
    [
        ("480p", "16:9", (480, 832)),
        ("480p", "9:16", (832, 480)),
        ("480p", "4:3", (480, 640)),
        ("720p", "16:9", (720, 1280)),
        ("720p", "3:4", (960, 720)),
        ("480", "16:9", (432, 768)),
        ("512", "4:3", (512, 640)),
        ("512", "9:16", (640, 384)),
        ("720", "16:9", (704, 1280)),
        ("720", "1:1", (960, 960)),
    ],
)
def test_table(resolution, ratio, size):
    assert table_size(resolution, ratio) == size


def test_every_size_of_the_table_is_a_number_of_tokens():
    sizes = [size for row in SIZES.values() for size in row.values()]
    assert len(sizes) == 25
    assert all(side % 16 == 0 for size in sizes for side in size)


@pytest.mark.parametrize(("resolution", "ratio", "told"), [("360p", "1:1", "480p, 720p, 480, 512, 720"), ("480p", "21:9", "1:1, 4:3, 3:4")])
def test_unknown_names_list_the_choices(resolution, ratio, told):
    with pytest.raises(ConfigError, match=told):
        table_size(resolution, ratio)


@pytest.mark.parametrize(
    ("image", "expected"),
    [((720, 1280), (720, 1280)), ((1280, 720), (1280, 720)), ((100, 100), (960, 960)), ((3024, 4032), (832, 1104)), ((1, 2), (672, 1360))],
)
def test_adaptive_size_keeps_shape_and_area(image, expected):
    """720p: A = 921,600. For 3024 x 4032 the ideal is 831.4 x 1108.5, for 1 x 2 it is 678.8 x
    1357.6.
    """
    assert adaptive_size(table_size("720p", "16:9"), image=FrameSize(*image)) == expected


def test_an_image_like_a_line_is_refused():
    with pytest.raises(ConfigError, match="too long"):
        adaptive_size(table_size("480p", "1:1"), image=FrameSize(1, 100_000))


def test_written_sizes():
    assert written_size("480x832") == written_size(" 480 X 832 ") == FrameSize(480, 832)
    assert str(FrameSize(480, 832)) == "480x832"
    with pytest.raises(ConfigError, match="the nearest is 480x832"):
        written_size("481x830")
    for bad in ("480", "480:832", "ax16", "0x16"):
        with pytest.raises(ConfigError, match="--size"):
            written_size(bad)
