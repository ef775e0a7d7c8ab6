"""One chunk loop for training and streaming: denoise a chunk against the cache, yield it, commit its context.

What varies is a value: the plan (steps, times, context rule), the step rule (consistency or Euler), where gradient is kept, and the cache.
Spec: algorithms 6.10, 7.2, 7.3; causal_inference 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from rcm.diffusion.blocks import BlockPattern
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.rollout.noise import VideoNoise
from rcm.rollout.plan import ChunkPlan
from rcm.samplers.steps import StepRule


@dataclass(frozen=True)
class Canvas:
    """The video being written: latent frames, token grid (h, w) per frame, block pattern, optional attention window and sinks in blocks."""

    num_frames: int
    grid: tuple[int, int]
    pattern: BlockPattern
    window: int | None = None
    sinks: int = 0

    def layout(self, block: int) -> TokenLayout:
        """Layout of block `block` over the cached prefix of all earlier blocks."""
        return TokenLayout.cached_chunk(
            block, grid=self.grid, pattern=self.pattern, num_frames=self.num_frames, window=self.window, sinks=self.sinks
        )


@dataclass(frozen=True)
class ChunkResult:
    """A finished chunk: prediction x0 [B, C, frames, H, W], the input of its last step and that step's RF time."""

    plan: ChunkPlan
    x0: torch.Tensor
    last_input: torch.Tensor
    last_time: float


def time_tensor(t: float, batch: int, device: torch.device) -> torch.Tensor:
    """RF time `t` as the float64 [B, 1] tensor that denoisers take."""
    return torch.full((batch, 1), t, dtype=torch.float64, device=device)


def rollout(
    denoiser: Denoiser,
    cond: Condition,
    plans: tuple[ChunkPlan, ...],
    *,
    canvas: Canvas,
    noise: VideoNoise,
    rule: StepRule,
    cache,
    grad: Literal["none", "last_step"] = "none",
    in_place: bool = False,
    commit_last: bool = True,
) -> Iterator[ChunkResult]:
    """Generate the chunks of `plans` in order, one `ChunkResult` each.

    `cache` comes from `denoiser.new_cache` and already holds every block before plans[0].block (see `prefill`). `grad="last_step"` keeps
    the graph of each chunk's last step only; the committed context is always detached, so no gradient crosses chunks. `in_place` uses the
    cache's transient writes (inference). `commit_last=False` skips the context pass of the final chunk, which nothing reads.
    A chunk that leaves its last input as context costs no extra forward when no gradient is kept: that forward runs in append mode.
    """
    for position, plan in enumerate(plans):
        commits = commit_last or position < len(plans) - 1
        result, committed = _denoise_chunk(
            denoiser, cond, plan, canvas=canvas, noise=noise, rule=rule, cache=cache, grad=grad, in_place=in_place, may_fuse=commits
        )
        yield result
        if commits and not committed:
            _commit(denoiser, cond, result, canvas=canvas, noise=noise, cache=cache)


def _denoise_chunk(denoiser, cond, plan, *, canvas, noise, rule, cache, grad, in_place, may_fuse) -> tuple[ChunkResult, bool]:
    frames = slice(plan.start, plan.stop)
    layout = canvas.layout(plan.block)
    x = noise.start(frames) * plan.times[0]
    fuse = may_fuse and grad == "none" and plan.commit == "last_input"
    for step, (t, t_next) in enumerate(zip(plan.times[:-1], plan.times[1:], strict=True)):
        last = step == plan.num_steps - 1
        view = cache.append() if (last and fuse) else cache.readonly(plan.block, transient=in_place)
        with torch.set_grad_enabled(last and grad == "last_step" and torch.is_grad_enabled()):
            v = denoiser.velocity(x, time_tensor(t, x.shape[0], x.device), cond, layout, cache=view)
            x_next = rule(x, v, t=t, t_next=t_next, noise=noise.step(step, frames) if rule.needs_noise and t_next > 0 else None)
        if last:
            return ChunkResult(plan, x_next, x, t), fuse
        x = x_next
    raise AssertionError("a plan has at least one step")


@torch.no_grad()
def _commit(denoiser, cond, result: ChunkResult, *, canvas, noise, cache) -> None:
    """Append the context of a finished chunk: clean, as last seen, or re-noised."""
    plan = result.plan
    if plan.commit == "clean":
        x, t = result.x0, 0.0
    elif plan.commit == "last_input":
        x, t = result.last_input, result.last_time
    else:
        t = plan.commit_time
        x = (1.0 - t) * result.x0 + t * noise.context(slice(plan.start, plan.stop))
    prefill(denoiser, cond, x, t=t, block=plan.block, canvas=canvas, cache=cache)


@torch.no_grad()
def prefill(denoiser: Denoiser, cond: Condition, x: torch.Tensor, *, t: float, block: int, canvas: Canvas, cache) -> None:
    """Append block `block` (x [B, C, frames, H, W], at RF time t) to the cache: given frames of a continuation, or a finished chunk."""
    denoiser.velocity(x.detach(), time_tensor(t, x.shape[0], x.device), cond, canvas.layout(block), cache=cache.append())
