"""Training windows from a folder of mp4 files: which frames of which clip, with which caption,
resized as they are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from loguru import logger

from rcm.core.errors import ConfigError
from rcm.core.text_file import read_text
from rcm.encoders.prompt_cleaning import says_nothing
from rcm.pipelines.video_io import VideoError, iter_frames, probe, resize_frame

COMPANION = "._"
"""Begins the name of a file in which macOS keeps what another file system cannot (AppleDouble): no
video, whatever its suffix.
"""


@dataclass(frozen=True)
class Window:
    """`num_frames` frames of `clip` from `start`, `stride` apart, with the clip's caption."""

    clip: Path
    start: int
    num_frames: int
    stride: int
    prompt: str

    @property
    def stop(self) -> int:
        """One past the last frame read."""
        return self.start + (self.num_frames - 1) * self.stride + 1


def find_clips(folder: Path) -> list[Path]:
    """The mp4 files under `folder`, sorted, without macOS's `._*` companions; `ConfigError` for no
    such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; change --input")
    clips = sorted(path for path in folder.rglob("*") if _is_clip(path))
    if not clips:
        raise ConfigError(f"no .mp4 file under {folder}; change --input")
    return clips


def _is_clip(path: Path) -> bool:
    return path.suffix.lower() == ".mp4" and not path.name.startswith(COMPANION) and path.is_file()


def caption_of(clip: Path) -> str:
    """The text beside the clip (`clip.txt`, may be empty), else the words of its file name. Errors
    of `read_text`.
    """
    beside = clip.with_suffix(".txt")
    if beside.is_file():
        text = read_text(beside, what="caption file")
        return "" if says_nothing(text) else " ".join(text.split())
    return " ".join(clip.stem.replace("_", " ").replace("-", " ").split())


def plan_windows(
    clips: Sequence[Path],
    *,
    num_frames: int,
    stride: int,
    hop: int | None = None,
    skip_bad: bool = False,
) -> list[Window]:
    """Windows of every clip, `hop` frames apart (default: end to end). Only frame counts are read.

    An unreadable clip raises `VideoError`, one shorter than a window `ConfigError`; with `skip_bad`
    both are left out, each with a warning.
    """
    if num_frames < 1 or stride < 1 or (hop is not None and hop < 1):
        raise ConfigError(
            f"windows need positive frames, stride and hop, got {num_frames}, {stride}, {hop};"
            " change --frames, --frame-stride, --hop"
        )
    span = (num_frames - 1) * stride + 1
    windows: list[Window] = []
    for clip in clips:
        try:
            available = probe(clip).num_frames
            if available < span:
                raise ConfigError(
                    f"{clip} has {available} frames, a window needs {span} ({num_frames} frames,"
                    f" {stride} apart); lower --frames or --frame-stride"
                )
        except (VideoError, ConfigError) as error:
            if not skip_bad:
                raise
            logger.warning(f"clip left out: {error}")
            continue
        windows += [
            Window(clip, start, num_frames, stride, caption_of(clip))
            for start in range(0, available - span + 1, hop or span)
        ]
    if not windows:
        raise ConfigError(f"none of {len(clips)} clips is usable; see the warnings above")
    return windows


def read_windows(windows: Sequence[Window], *, height: int, width: int) -> Iterator[torch.Tensor]:
    """Pixels float32 [3, F, height, width] in [-1, 1] of each window in turn; frames are scaled to
    cover the size and cut at the centre.

    Consecutive windows of one clip share one decoding pass, and only frames that are still needed
    stay in memory.
    """
    for clip, group in groupby(windows, key=lambda window: window.clip):
        waiting = list(group)
        kept: dict[int, torch.Tensor] = {}
        needed = {f for w in waiting for f in range(w.start, w.stop, w.stride)}
        for number, frame in enumerate(iter_frames(clip)):
            if number in needed:
                kept[number] = resize_frame(frame, height=height, width=width)
            while waiting and number + 1 >= waiting[0].stop:
                window = waiting.pop(0)
                yield torch.stack(
                    [kept[f] for f in range(window.start, window.stop, window.stride)], dim=1
                )
                oldest = min((w.start for w in waiting), default=number + 1)
                kept = {f: pixels for f, pixels in kept.items() if f >= oldest}
            if not waiting:
                break
        if waiting:
            raise VideoError(
                f"{clip} ended before frame {waiting[0].stop - 1}, which its frame count promised"
            )
