"""Replayed back-propagation: each chunk's last step again, with gradient, on what it saw.

The rollout ran without gradient and kept, per chunk, the last input and its time, plus the
(detached) cache. Replaying a chunk gives the same x0 and the same parameter gradient as keeping the
graph of every chunk, with the activation memory of one chunk (Causal-rCM 4.3).
"""

from __future__ import annotations

from torch import Tensor

from rcm.nets.condition import Condition
from rcm.nets.paired_cache import Cache
from rcm.nets.velocity_model import VelocityModel
from rcm.rollout.autoregressive import Canvas, ChunkResult, time_tensor


def replay_chunk(
    denoiser: VelocityModel, cond: Condition, result: ChunkResult, *, canvas: Canvas, cache: Cache
) -> Tensor:
    """x0 of a chunk again, with gradient: x - t v(x, t | what it saw); shaped as `result.x0`."""
    x, t = result.last_input.detach(), result.last_time
    view = cache.readonly(visible=result.placement.visible)
    layout = canvas.layout(result.placement.frame_index, view)
    return x - t * denoiser.velocity(
        x, time_tensor(t, x.shape[0], x.device), cond, layout, cache=view
    )
