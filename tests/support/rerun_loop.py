"""Captured loops without CUDA: in place of a graph, the step itself is run again, on whatever its
inputs hold by then.
"""

from __future__ import annotations

from rcm.pipelines.engine import CapturedLoop


class Rerun:
    """Stands in for a graph."""

    def __init__(self, step):
        self.replay = step


class RerunLoop(CapturedLoop):
    """Stands in for `ChunkLoop` in a session."""

    def _graph(self, step, device):
        return Rerun(step)
