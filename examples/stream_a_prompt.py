"""Stream a video chunk by chunk, and use each chunk the moment it is there."""

from __future__ import annotations

import rcm

model = rcm.load()  # or the path of a checkpoint: a job folder, an exported file
for chunk in model.stream("a red square moving left", num_frames=33):
    height, width = chunk.frames.shape[-2:]
    print(
        f"chunk {chunk.block}: {chunk.frames.shape[2]} frames of {height}x{width},"
        f" {chunk.seconds:.3f} s after the start"
    )
