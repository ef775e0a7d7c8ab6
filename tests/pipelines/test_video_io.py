from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rcm.core.errors import ConfigError
from rcm.pipelines.video_io import (
    Mp4Writer,
    VideoError,
    contact_sheet,
    enlarge,
    iter_frames,
    probe,
    read_mp4,
    resize_frame,
    to_uint8,
    write_gif,
    write_mp4,
)
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    world = ToyWorld(ToyWorldConfig.at_size(16, 16))
    return world.render(world.scenes(1, seed=3))[0]


def write_chunks(path, chunks) -> None:
    with Mp4Writer(path, fps=8) as writer:
        for chunk in chunks:
            writer.append(chunk)


def test_mp4_round_trip(tmp_path, video):
    """Sizes, number and order of frames are exact; pixels up to the loss of yuv420p, which enlarging makes small."""
    path = write_mp4(tmp_path / "sub" / "a.mp4", video, fps=8, scale=4, crf=4)
    info = probe(path)
    assert (info.fps, info.width, info.height, info.num_frames) == (8, 64, 64, 17)
    back = read_mp4(path)
    assert back.shape == (3, 17, 64, 64) and back.dtype == torch.float32
    error = (back - enlarge(video, 4)).abs().mean(dim=(0, 2, 3))
    assert error.max() < 0.04
    assert (back - enlarge(video.roll(1, dims=1), 4)).abs().mean() > 0.05
    assert not list((tmp_path / "sub").glob(".*"))


def test_chunks_make_the_same_file(tmp_path, video):
    write_mp4(tmp_path / "a.mp4", video, fps=8)
    write_chunks(tmp_path / "b.mp4", video.split([1, 4, 12], dim=1))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_odd_sizes_are_refused_or_padded(tmp_path, video):
    odd = video[:, :, :15, :13]
    with pytest.raises(ConfigError, match="even sides, got 13x15"):
        write_mp4(tmp_path / "a.mp4", odd, fps=8)
    assert not list(tmp_path.iterdir())
    info = probe(write_mp4(tmp_path / "a.mp4", odd, fps=8, pad=True))
    assert (info.width, info.height) == (14, 16)
    assert probe(write_mp4(tmp_path / "a.mp4", odd, fps=8, scale=2)).width == 26


def test_a_failed_write_keeps_the_older_file(tmp_path, video):
    path = write_mp4(tmp_path / "a.mp4", video, fps=8)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="frame size changed"):
        write_chunks(path, [video, video[:, :, :8]])
    with pytest.raises(ConfigError, match="NaN"):
        write_mp4(path, video * float("nan"), fps=8)
    with pytest.raises(ConfigError, match="no frames"):
        write_chunks(path, [])
    with pytest.raises(ConfigError, match="one video of a batch"):
        write_mp4(path, video.unsqueeze(0), fps=8)
    with pytest.raises(ConfigError, match="fps"):
        write_mp4(path, video, fps=0)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_unwritable_places_are_named(tmp_path, video):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"a\.mp4"):
        write_mp4(tmp_path / "file" / "a.mp4", video, fps=8)
    (tmp_path / ".b.mp4.partial").mkdir()  # ffmpeg cannot open its output
    for size in (1, 32):  # less and more than a pipe holds
        with pytest.raises(OSError, match=r"cannot write video.*'.*/b\.mp4'"):
            write_mp4(tmp_path / "b.mp4", video.repeat(1, 1, size, size), fps=8)
    with pytest.raises(OSError, match=r"cannot write picture.*a\.png"):
        contact_sheet(tmp_path / "file" / "a.png", video.unsqueeze(0))


def test_unreadable_files_are_named(tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    for read in (probe, read_mp4, lambda p: next(iter_frames(p))):
        with pytest.raises(VideoError, match=r"cannot decode .*bad\.mp4"):
            read(bad)
        with pytest.raises(VideoError, match=r"no video file at .*none\.mp4"):
            read(tmp_path / "none.mp4")


def test_pixels_to_bytes():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255]
    assert enlarge(torch.tensor([[1, 2]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_resize_covers_and_cuts_the_centre():
    frame = torch.zeros(40, 80, 3, dtype=torch.uint8)
    frame[:, 20:60] = 255  # the middle half of a wide frame
    small = resize_frame(frame, height=10, width=10)
    assert small.shape == (3, 10, 10)
    assert (small[:, :, 1:-1] == 1).all() and (small > 0.5).all()
    tall = resize_frame(frame, height=20, width=10)
    assert tall.shape == (3, 20, 10) and (tall == 1).all()
    whole = resize_frame(frame, height=10, width=20)
    assert (whole[:, :, :4] == -1).all() and (whole[:, :, 6:14] == 1).all()


def test_contact_sheet_and_gif(tmp_path, video):
    path = contact_sheet(tmp_path / "sheet.png", torch.stack([video, -video]), labels=["one", "two"], columns=3, scale=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * (32 + 2 + 12) + 2, 3 * 34 + 2, 3)
    first = enlarge(to_uint8(video[:, 0]), 2).permute(1, 2, 0).numpy()
    last = enlarge(to_uint8(-video[:, 16]), 2).permute(1, 2, 0).numpy()
    assert (sheet[14:46, 2:34] == first).all()
    assert (sheet[60:92, 70:102] == last).all()
    with pytest.raises(ConfigError, match="one label per video"):
        contact_sheet(path, video.unsqueeze(0), labels=["a", "b"])
    with Image.open(write_gif(tmp_path / "a.gif", video, fps=8)) as gif:
        assert gif.n_frames == 17 and gif.size == (64, 64)
