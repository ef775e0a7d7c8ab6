"""The 20 extra channels of image-to-video against a computation by hand; images that cannot be
read.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rcm.core.errors import ConfigError
from rcm.pipelines.image_condition import fit_image, image_channels, image_size, read_image
from rcm.pipelines.video_io import VideoError
from rcm.pipelines.wan_sizes import FrameSize
from rcm.worlds.toy_codec import ToyCodec
from tests.support.stand_in_codec import StandInCodec


def picture(height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_channels_by_hand():
    frame = fit_image(picture(), FrameSize(16, 32))
    got = image_channels(StandInCodec(), frame, num_frames=9)
    assert tuple(got.shape) == (1, 20, 3, 2, 4)
    assert torch.equal(got[:, :4, 0], torch.ones(1, 4, 2, 4)), "the mask is one on the first latent frame"
    assert not got[:, :4, 1:].any(), "and zero on the others"
    cells = torch.nn.functional.avg_pool2d(frame[:, :, 0], 8)
    torch.testing.assert_close(got[:, 4:7, 0], cells)
    assert not got[:, 4:, 1:].any(), "grey frames (zeros) have zero means"


def test_channels_of_two_frames_by_hand():
    """The last pixel frame is the fourth of its latent frame; grey lies between the two."""
    size = FrameSize(16, 32)
    first, last = fit_image(picture(), size), fit_image(picture(31, 17), size)
    got = image_channels(StandInCodec(), first, num_frames=9, last=last)
    mask = torch.zeros(1, 4, 3, 2, 4)
    mask[:, :, 0], mask[:, 3, 2] = 1, 1
    assert torch.equal(got[:, :4], mask)
    for frame, image in ((0, first), (2, last)):
        torch.testing.assert_close(got[:, 4:7, frame], torch.nn.functional.avg_pool2d(image[:, :, 0], 8))
    assert not got[:, 4:, 1].any()
    with pytest.raises(ConfigError, match="at least 5 frames, got 1; change --num_frames"):
        image_channels(StandInCodec(), first, num_frames=1, last=last)


def test_fitting_stretches_and_maps_to_minus_one_and_one():
    image = torch.zeros(8, 8, 3, dtype=torch.uint8)
    image[:, 4:] = 255
    fitted = fit_image(image, FrameSize(4, 16))
    assert tuple(fitted.shape) == (1, 3, 1, 4, 16)
    assert (fitted[..., :6] == -1).all() and (fitted[..., 10:] == 1).all()
    torch.testing.assert_close(fit_image(picture(), FrameSize(20, 30))[0, :, 0], picture().permute(2, 0, 1) / 127.5 - 1)


def test_downscaling_is_antialiased():
    """To a third, the centres fall on every third pixel: without the filter alternately black and
    white.
    """
    stripes = torch.zeros(48, 48, 3, dtype=torch.uint8)
    stripes[:, ::2] = 255
    assert fit_image(stripes, FrameSize(16, 16))[..., 1:-1].abs().max() < 0.4


def test_reading(tmp_path):
    Image.fromarray(picture().numpy()).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), picture())
    assert image_size(picture()) == (20, 30)
    turned = Image.fromarray(picture().numpy())
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to be upright
    turned.save(tmp_path / "b.png", exif=exif)
    assert image_size(read_image(tmp_path / "b.png")) == (30, 20)
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png")
    assert tuple(read_image(tmp_path / "grey.png").shape) == (4, 4, 3)


def test_pictures_of_more_than_8_bits_keep_their_greys(tmp_path):
    grey = np.linspace(0, 65535, 24 * 8).reshape(8, 24).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    read = read_image(tmp_path / "deep.png")
    assert (read.double() - torch.from_numpy(grey / 257.0)[..., None]).abs().max() <= 0.5
    Image.fromarray(grey.astype(np.float32) / 65535).save(tmp_path / "float.tiff")
    with pytest.raises(VideoError, match=r"float\.tiff holds 32-bit .* convert it to 8 bits"):
        read_image(tmp_path / "float.tiff")


def test_what_is_transparent_shows_white_and_a_preview_is_no_second_picture(tmp_path):
    pixels = np.full((4, 6, 4), (10, 20, 30, 255), np.uint8)
    pixels[:, 3:, 3] = 0
    pixels[0, 0, 3] = 128
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png")
    assert (read[:, 3:] == 255).all() and read[1, 1].tolist() == [10, 20, 30] and 130 < read[0, 0, 0] < 135
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    indexed.putdata([0, 1])
    indexed.save(tmp_path / "indexed.png", transparency=1)
    assert read_image(tmp_path / "indexed.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]
    photo = Image.new("RGB", (8, 8), (200, 100, 0))
    photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert tuple(read_image(tmp_path / "photo.jpg").shape) == (8, 8, 3)


def test_unreadable_images(tmp_path):
    with pytest.raises(VideoError, match="no image file at"):
        read_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(VideoError, match=r"cannot decode .*text\.png"):
        read_image(tmp_path / "text.png")
    Image.fromarray(picture().numpy()).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(VideoError, match=r"cannot decode .*half\.png"):
        read_image(tmp_path / "half.png")


def test_a_codec_of_another_stride_has_no_mask():
    with pytest.raises(ConfigError, match="mask has a channel per pixel frame"):
        image_channels(ToyCodec(), torch.zeros(1, 3, 1, 8, 8), num_frames=5)
    with pytest.raises(ConfigError, match="num_frames=5 or 9"):
        image_channels(StandInCodec(), torch.zeros(1, 3, 1, 8, 8), num_frames=7)
