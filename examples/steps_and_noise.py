"""One checkpoint, one noise, three numbers of steps: side by side in one file."""

from __future__ import annotations

from pathlib import Path

import torch

import rcm
from rcm.pipelines.video_io import comfortable_scale, write_mp4

model = rcm.load()
recipe = model.loaded.recipe
videos = []
for steps in (4, 2, 1):
    video, report = model.generate(
        "a blue triangle moving up", recipe=recipe.with_steps(4, steps), seed=7
    )
    videos.append(video[0])
    print(f"{steps} steps per later chunk: {report.fps:.0f} frames per second")
path = Path("outputs/steps.mp4")
write_mp4(
    path,
    torch.cat(videos, dim=-1),
    fps=model.loaded.fps,
    scale=comfortable_scale(*model.loaded.pixel_size),
    pad=True,
)
print(f"4, 2 and 1 steps, from left to right: {path}")
