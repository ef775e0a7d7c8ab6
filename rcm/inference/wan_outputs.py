"""Where a Wan command writes: the video, its samples side by side, and a contact sheet of it. Found
writable before the work, there when they are whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from rcm.core.output_file import OutputFile
from rcm.inference.outcome import sparing
from rcm.parallel.agree import on_first, shared
from rcm.pipelines.video_io import Mp4Writer, claim_video, contact_sheet

PREVIEW_HEIGHT, PREVIEW_COLUMNS = 160, 8


def claimed(
    flags: argparse.Namespace, name: str, suffix: str, *, number: int = 0, count: int = 1
) -> OutputFile | None:
    """The file that the flag `name` names, None where it names none; of several videos NAME-000 and
    so on. Rank 0 looks whether it can be written; all know.
    """
    path = getattr(flags, name)
    if path is None:
        return None
    if count > 1:
        path = str(Path(path).with_name(f"{Path(path).stem}-{number:03d}{Path(path).suffix}"))
    knob = f"--{name}"

    def claim() -> OutputFile:
        video = suffix == ".mp4"
        target = (
            claim_video(path, knob=knob)
            if video
            else OutputFile.claim(path, suffix=suffix, knob=knob)
        )
        return sparing(target, flags, knob=knob)

    return shared(on_first(claim))


class VideoWriter:
    """A `with` block that writes a video of `num_frames` frames chunk by chunk, and its contact
    sheet, a row per sample, where `preview` is a file.
    """

    def __init__(
        self,
        video: OutputFile,
        preview: OutputFile | None,
        *,
        flags: argparse.Namespace,
        num_frames: int,
        prompt: str,
    ) -> None:
        self._preview, self._num_frames, self._written = preview, num_frames, 0
        self._writer = Mp4Writer(video, fps=flags.fps)
        # the built-in font may have no other letters
        self._prompt, self._seed = prompt[:120].encode("ascii", "replace").decode(), flags.seed
        picks = torch.linspace(0, num_frames - 1, min(PREVIEW_COLUMNS, num_frames))
        self._picks = set(picks.round().long().tolist())
        self._small: list[Tensor] = []

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def append(self, frames: Tensor) -> None:
        """Pixels [B, 3, f, H, W] in [-1, 1]."""
        self._writer.append(torch.cat(list(frames), dim=-1))
        height = min(PREVIEW_HEIGHT, frames.shape[3])
        size = (height, max(1, round(frames.shape[4] * height / frames.shape[3])))
        for frame in frames.unbind(2):
            if self._preview is not None and self._written in self._picks:
                small = torch.nn.functional.interpolate(frame.float(), size=size, mode="area")
                self._small.append(small.cpu())
            self._written += 1
        if self._preview is not None and self._written == self._num_frames:
            labels = [f"seed {self._seed}, sample {i}: {self._prompt}" for i in range(len(frames))]
            small = torch.stack(self._small, dim=2)
            contact_sheet(self._preview, small, labels=labels, columns=PREVIEW_COLUMNS, scale=1)
