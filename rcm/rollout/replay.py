"""Replayed back-propagation: recompute one chunk's last step at a time, with gradient, against its readonly prefix.

The rollout ran without gradient and kept, per chunk, the last input and its time, plus the (detached) cache. Replaying a chunk gives the
same x0 and the same parameter gradient as keeping the graph of every chunk, with the activation memory of one chunk (spec/algorithms 6.11).
"""

from __future__ import annotations

import torch

from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.rollout.autoregressive import Canvas, ChunkResult, time_tensor


def replay_chunk(denoiser: Denoiser, cond: Condition, result: ChunkResult, *, canvas: Canvas, cache) -> torch.Tensor:
    """x0 of one finished chunk, recomputed with gradient: x - t v(x, t | first `block` chunks of the cache). Shape as `result.x0`."""
    x, t = result.last_input.detach(), result.last_time
    view = cache.readonly(result.plan.block)
    v = denoiser.velocity(x, time_tensor(t, x.shape[0], x.device), cond, canvas.layout(result.plan.block), cache=view)
    return x - t * v
