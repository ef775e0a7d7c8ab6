from __future__ import annotations

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.pipelines.clip_folder import caption_of, find_clips, plan_windows, read_windows
from rcm.pipelines.video_io import VideoError, write_mp4


def ramp(frames: int) -> torch.Tensor:
    """Frame i is flat grey of brightness i / 20 - 1, so that a frame tells its number."""
    return (torch.arange(frames) / 20 - 1).view(1, -1, 1, 1).expand(3, -1, 32, 48)


def numbers(video: torch.Tensor) -> list[int]:
    return ((video.mean(dim=(0, 2, 3)) + 1) * 20).round().int().tolist()


@pytest.fixture
def folder(tmp_path):
    write_mp4(tmp_path / "b_clip-one.mp4", ramp(25), fps=10, crf=1)
    write_mp4(tmp_path / "sub" / "a.MP4", ramp(12), fps=10, crf=1)
    (tmp_path / "sub" / "a.txt").write_text("a grey \n ramp\n")
    (tmp_path / "notes.md").write_text("not a clip")
    return tmp_path


def test_clips_and_captions(folder):
    clips = find_clips(folder)
    assert [clip.name for clip in clips] == ["b_clip-one.mp4", "a.MP4"]
    assert [caption_of(clip) for clip in clips] == ["b clip one", "a grey ramp"]
    for bad, word in ((folder / "none", "no folder"), (folder / "empty", "no .mp4")):
        if bad.name == "empty":
            bad.mkdir()
        with pytest.raises(ConfigError, match=word):
            find_clips(bad)


def test_windows_slide_and_hold_the_right_frames(folder):
    windows = plan_windows(find_clips(folder), num_frames=5, stride=2, hop=4)
    assert [(w.clip.stem, w.start) for w in windows] == [("b_clip-one", s) for s in (0, 4, 8, 12, 16)] + [("a", 0)]
    videos = list(read_windows(windows, height=16, width=16))
    for window, video in zip(windows, videos, strict=True):
        assert video.shape == (3, 5, 16, 16)
        assert numbers(video) == list(range(window.start, window.start + 9, 2))
    assert [w.start for w in plan_windows(find_clips(folder)[:1], num_frames=5, stride=2)] == [0, 9]
    later = list(read_windows(windows[3:5], height=16, width=16))
    assert torch.equal(later[0], videos[3]) and torch.equal(later[1], videos[4])


def test_short_and_broken_clips(folder):
    clips = find_clips(folder)
    with pytest.raises(ConfigError, match=r"a\.MP4 has 12 frames, a window needs 17"):
        plan_windows(clips, num_frames=17, stride=1)
    (folder / "c.mp4").write_bytes(b"junk" * 50)
    with pytest.raises(VideoError, match=r"cannot decode .*c\.mp4"):
        plan_windows(find_clips(folder), num_frames=5, stride=1)
    kept = plan_windows(find_clips(folder), num_frames=17, stride=1, skip_bad=True)
    assert [w.clip.stem for w in kept] == ["b_clip-one"]
    with pytest.raises(ConfigError, match="none of 3 clips"):
        plan_windows(find_clips(folder), num_frames=99, stride=1, skip_bad=True)
    with pytest.raises(ConfigError, match="--frame-stride"):
        plan_windows(clips, num_frames=5, stride=0)
