from __future__ import annotations

import os
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from rcm.core.errors import ConfigError, NonFinite
from rcm.pipelines.video_io import (
    Mp4Writer,
    VideoError,
    claim_video,
    contact_sheet,
    enlarge,
    iter_frames,
    probe,
    read_mp4,
    resize_frame,
    to_uint8,
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
    """Sizes, number and order of frames are exact; pixels up to the loss of yuv420p, which
    enlarging makes small.
    """
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
    with pytest.raises(NonFinite, match="NaN"):
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
    with pytest.raises(OSError, match=r"cannot write there.*a\.png"):
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
    with pytest.raises(ConfigError, match="floats in .-1, 1., got torch.uint8"):
        to_uint8(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
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


def ffmpeg(*words: str, folder) -> None:
    source = ("-f", "lavfi", "-i", "testsrc=s=64x32:d=4:r=10", "-pix_fmt", "yuv420p", "-g", "5", "-movflags", "+faststart")
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *source, *words], cwd=folder, check=True)


@pytest.mark.parametrize(("ratio", "width"), [("4/3", 85), ("1/1", 64), ("8/9", 57), ("0", 64)])
def test_pixels_that_are_not_square_are_stretched_to_their_shape(tmp_path, ratio, width):
    ffmpeg("-vf", f"setsar={ratio}", "a.mp4", folder=tmp_path)
    assert next(iter_frames(tmp_path / "a.mp4")).shape == (32, width, 3)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.num_frames, info.fps) == (width, 32, 40, 10)


def test_a_rotated_clip_is_upright(tmp_path):
    ffmpeg("a.mp4", folder=tmp_path)
    turned = ("-display_rotation", "90", "-i", "a.mp4", "-c", "copy", "b.mp4")
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *turned], cwd=tmp_path, check=True)
    assert next(iter_frames(tmp_path / "b.mp4")).shape == (64, 32, 3)
    assert (probe(tmp_path / "b.mp4").width, probe(tmp_path / "b.mp4").height) == (32, 64)


@pytest.mark.parametrize("name", ["12:30.mp4", "-y.mp4", "a b'\"#%d[1].mp4", "http:a.mp4", "\N{SNOWMAN}.mp4", "x" * 251 + ".mp4"])
def test_any_name_is_a_name(tmp_path, monkeypatch, video, name):
    """In the current folder, without a path before it, as it is typed."""
    monkeypatch.chdir(tmp_path)
    assert write_mp4(name, video, fps=8) == Path(name)
    assert os.listdir() == [name]
    assert probe(name).num_frames == len(list(iter_frames(name))) == 17


def test_a_file_that_is_cut_off_or_names_others_is_refused(tmp_path):
    ffmpeg("whole.mp4", folder=tmp_path)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
    for name, told in (("cut", "the file is cut off"), ("list", "not on whitelist")):
        for read in (probe, read_mp4):
            with pytest.raises(VideoError, match=f"cannot decode .*{name}.mp4: .*{told}"):
                read(tmp_path / f"{name}.mp4")


@pytest.mark.parametrize("size", [1, 32], ids=["less than a pipe holds", "more"])
def test_a_failed_write_says_where_the_frames_are(tmp_path, monkeypatch, video, size):
    """The encoder fails under the chosen name, then everywhere."""
    real, fake, kept = imageio_ffmpeg.get_ffmpeg_exe(), tmp_path / "fake", tmp_path / "kept"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in */kept/*) [ -e "{tmp_path}/broken" ] || exec "{real}" "$@";; esac\n'
        "echo No space left on device >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    kept.mkdir()
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    chunks = video.repeat(1, 1, size, size).split([5, 12], dim=1)
    with pytest.raises(OSError, match=r"No space left.*its (5|17) frames are kept in .*/kept/.*/b\.mp4.*'.*/b\.mp4'"):
        write_chunks(tmp_path / "b.mp4", chunks)
    [found] = kept.rglob("b.mp4")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: real)
    assert probe(found).num_frames in (5, 17)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
    (tmp_path / "broken").touch()
    with pytest.raises(OSError, match=r"frames are kept in .*/kept/.*/b\.npy"):
        write_chunks(tmp_path / "b.mp4", chunks)
    [found] = kept.rglob("b.npy")
    pixels = torch.from_numpy(np.load(found)).permute(3, 0, 1, 2)
    assert torch.equal(pixels, to_uint8(torch.cat(chunks, dim=1))[:, : pixels.shape[1]])
    assert not [p for p in tmp_path.iterdir() if "b.mp4" in p.name or "partial" in p.name]


def test_what_was_made_before_ctrl_c_is_kept(tmp_path, video):
    (tmp_path / "a.mp4").write_bytes(b"older")

    def chunks():
        yield video
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_chunks(tmp_path / "a.mp4", chunks())
    assert probe(tmp_path / "a.partial.mp4").num_frames == 17
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.partial.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"older"


def test_without_ffmpeg_it_is_said_before_anything_is_made(tmp_path, monkeypatch):
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(ConfigError, match="written by ffmpeg, and none was found: `pip install imageio-ffmpeg`"):
        claim_video(tmp_path / "a.mp4", knob="--save_path")
    with pytest.raises(ConfigError, match="none was found"):
        write_mp4(tmp_path / "a.mp4", torch.zeros(3, 2, 16, 16), fps=8)
    assert not list(tmp_path.iterdir())
    (tmp_path / "b.mp4").touch(mode=0o600)
    with pytest.raises(ConfigError, match="read and written by ffmpeg, and none was found"):
        probe(tmp_path / "b.mp4")
    for no_program in (tmp_path / "nowhere", tmp_path / "b.mp4", tmp_path):
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda path=no_program: str(path))
        for use in (lambda: claim_video(tmp_path / "a.mp4", knob="--save_path"), lambda: probe(tmp_path / "b.mp4")):
            with pytest.raises(ConfigError, match=f"IMAGEIO_FFMPEG_EXE={no_program} is no program that can be run"):
                use()


def test_an_ffmpeg_that_does_not_start_costs_no_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="its 2 frames are kept in") as failed:
        write_mp4(tmp_path / "a.mp4", torch.zeros(3, 2, 16, 16), fps=8)
    assert "nowhere" in str(failed.value) or "No such file" in str(failed.value)
    (kept,) = tmp_path.glob("rcm-kept-*/*.npy")
    assert np.load(kept).shape == (2, 16, 16, 3)
