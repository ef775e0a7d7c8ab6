"""The videos a demo keeps of each stage: a small one for the grid of the page, and a large one
beside the stage's teacher.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch

from rcm.core.output_file import OutputFile
from rcm.pipelines.video_io import enlarge, to_uint8, write_mp4
from rcm.storage.pickle_file import read_tensor
from scripts.demo_stages import Stage

SMALL, LARGE = 4, 6
"""Prompts in a cell of the grid (two rows of two), and in the large view (one row)."""
FPS = 6
GAP, GROUND = 2, -0.7
"""Pixels between videos, and their grey."""
CRF = 26
"""Quality of x264: squares of one colour stand more compression than natural pictures, and all
videos are part of one page.
"""


def picks(num: int) -> list[int]:
    """Which of `num` videos are shown: far apart, so that shapes, colours and directions differ."""
    step = 17 if num % 17 else 19
    return sorted(step * i % num for i in range(LARGE))


def stem(name: str, label: str) -> str:
    """File name, without folder and suffix, of a stage's videos with one sampler."""
    return f"{name}_{label}".replace(" ", "")


def teacher_of(stage_name: str) -> tuple[str, str] | None:
    """(stage, label) of what a stage learned from; None for the first."""
    kind, _, pattern = stage_name.rpartition("_")
    if not kind:
        return None
    return ("bidirectional", "many steps") if kind == "tf" else (f"tf_{pattern}", "many steps")


def keep_clips(
    folder: Path, stage: Stage, label: str, videos: torch.Tensor, prompts: Sequence[str]
) -> None:
    """Write the small video of `videos` [N, 3, F, H, W], the large one, and the shown pixels for
    later comparisons.
    """
    shown, name = videos[picks(len(prompts))].clamp(-1, 1), stem(stage.name, label)
    target = folder / "videos"
    target.mkdir(parents=True, exist_ok=True)
    torch.save(to_uint8(shown), pixels := io.BytesIO())
    OutputFile.claim(target / f"{name}.pt").write(pixels.getvalue())  # other branches may read it
    _keep(target / f"{name}.mp4", mosaic(shown[:SMALL], rows=2, scale=8))
    above = _stored(target / f"{stem(*teacher_of(stage.name))}.pt") if stage.feeds else None
    both = shown if above is None or above.shape != shown.shape else torch.cat([above, shown])
    large = mosaic(both, rows=len(both) // len(shown), scale=12)
    _keep(target / f"{name}_large.mp4", large)


def keep_drift(folder: Path, stage: Stage, videos: torch.Tensor, prompts: Sequence[str]) -> None:
    """Write the long stream's video."""
    shown = videos[picks(len(prompts))[:SMALL]].clamp(-1, 1)
    _keep(folder / "videos" / f"{stage.name}_long.mp4", mosaic(shown, rows=1, scale=12))


def mosaic(videos: torch.Tensor, *, rows: int, scale: int) -> torch.Tensor:
    """[N, 3, F, H, W] as one video [3, F, h, w]: `rows` rows, every pixel `scale` x `scale`, a gap
    around each.
    """
    large = torch.nn.functional.pad(enlarge(videos, scale), (GAP, GAP, GAP, GAP), value=GROUND)
    return torch.cat([torch.cat(list(row), dim=-1) for row in large.chunk(rows)], dim=-2)


def _keep(path: Path, video: torch.Tensor) -> None:
    write_mp4(path, video, fps=FPS, pad=True, crf=CRF)


def _stored(path: Path) -> torch.Tensor | None:
    return read_tensor(path, name=str(path)).float() / 127.5 - 1 if path.is_file() else None
