"""The student's own video in self-forced training: rolled out whole, or longer than what is judged
(long tuning).

Long tuning (LongLive, arXiv 2509.22622; Causal_rCM.md section 6): `frames` latent frames or fewer
are rolled out as inference streams them, at absolute positions, over a cache that holds a window of
blocks and sinks; a window of them, its end drawn among the blocks, is judged.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import torch

from rcm.core.rng import StepRng
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.rollout.autoregressive import Cache, Canvas, ChunkResult, rollout
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.noise import VideoNoise
from rcm.rollout.plan import ChunkPlan, ContextRule, StepSchedule, training_plan
from rcm.samplers.steps import ConsistencyStep


@dataclass
class OwnVideo:
    """The judged frames of a rollout, which begin at its frame `first`: the chunks that hold them,
    the canvas and the cache behind them.
    """

    canvas: Canvas
    cache: Cache
    first: int = 0
    chunks: list[ChunkResult] = field(default_factory=list)

    @property
    def video(self) -> torch.Tensor:
        """[B, C, T, H, W]."""
        return torch.cat([self.judged(chunk.plan, chunk.x0) for chunk in self.chunks], dim=2)

    def judged(self, plan: ChunkPlan, x0: torch.Tensor) -> torch.Tensor:
        """The judged frames of a chunk `x0` [B, C, frames, H, W]: all, unless the judged window
        begins inside it.
        """
        return x0[:, :, max(0, self.first - plan.start) :]

    def part(self, plan: ChunkPlan) -> slice:
        """Where they stand in `video`."""
        return slice(max(0, plan.start - self.first), plan.stop - self.first)


@dataclass(frozen=True)
class SelfRollout:
    """How a student makes videos to be judged. `forcing`: block pattern, and what a chunk sees of
    the past.

    `frames` None: a rollout is as long as what is judged, every chunk stays in the cache. Else: the
    judged frames end after a block that the step draws, at `frames` or before. Chunks before them
    are streamed without gradient, and the cache drops what nothing sees any more.
    """

    student: Denoiser
    forcing: TeacherForcing
    schedule: StepSchedule
    context: ContextRule = ContextRule()
    frames: int | None = None

    def __call__(
        self, cond: Condition, like: torch.Tensor, rng: StepRng, *, index: int, grad: bool
    ) -> OwnVideo:
        """A video of the shape and precision of `like` (its values are not used). `index` of the
        role's update; `grad` keeps the graph of the last step of every judged chunk.
        """
        plans, first = self._plans(like.shape[2], rng, index=index)
        lead = sum(plan.stop <= first for plan in plans)
        shape = (*like.shape[:2], plans[-1].stop, *like.shape[3:])
        dtype = torch.promote_types(like.dtype, torch.float32)
        grid = self.student.token_grid(shape[3], shape[4])
        cache = self.student.new_cache(num_frames=self._room(plans, lead), grid=grid)
        noise = VideoNoise.for_plans(
            plans, shape, generator=rng.generator("rollout"), dtype=dtype, device=like.device
        )
        if lead:
            self._stream(
                cond,
                plans[: lead + 1],
                canvas=Canvas(grid, self._policy(keep=False)),
                noise=noise,
                cache=cache,
            )
        out = OwnVideo(Canvas(grid, self._policy(keep=True)), cache, first)
        with torch.set_grad_enabled(grad):
            chunks = rollout(
                self.student,
                cond,
                plans[lead:],
                canvas=out.canvas,
                noise=noise,
                rule=ConsistencyStep(),
                cache=cache,
                grad="last_step" if grad else "none",
                commit_last=False,
            )
            out.chunks.extend(chunks)
        return out

    def _plans(self, judged: int, rng: StepRng, *, index: int) -> tuple[tuple[ChunkPlan, ...], int]:
        """The chunks to make, up to the last judged one, and the first judged frame."""
        plans = training_plan(
            self.forcing.pattern,
            self.frames or judged,
            self.schedule,
            index=index,
            context=self.context,
        )
        ends = [end for end, plan in enumerate(plans, 1) if plan.stop >= judged]
        # all ranks roll out as many chunks: their passes gather sharded weights together
        source = replace(rng, dp_rank=0, device="cpu").generator("rollout/window")
        end = ends[int(torch.randint(len(ends), (), generator=source))]
        return plans[:end], plans[end - 1].stop - judged

    @torch.no_grad()
    def _stream(
        self,
        cond: Condition,
        plans: tuple[ChunkPlan, ...],
        *,
        canvas: Canvas,
        noise: VideoNoise,
        cache: Cache,
    ) -> None:
        """Make all chunks but the last of `plans`, and leave of them what that one sees."""
        deque(
            rollout(
                self.student,
                cond,
                plans[:-1],
                canvas=canvas,
                noise=noise,
                rule=ConsistencyStep(),
                cache=cache,
            ),
            maxlen=0,
        )
        canvas.policy.before(cache.branches, plans[-1])
        for branch in cache.branches:
            # closes gaps now: what a pass with gradient read is read again by recomputation, so it
            # may not move
            branch.room(0)

    def _policy(self, *, keep: bool) -> CachePolicy:
        """What a chunk sees; with `keep` nothing is dropped, since replayed chunks look back."""
        if self.forcing.window is None:
            return CachePolicy()
        return SlidingWindow(self.forcing.window, self.forcing.sinks, keep=keep)

    def _room(self, plans: tuple[ChunkPlan, ...], lead: int) -> int:
        """Frames in the cache at most: what a streamed chunk sees, and the judged chunks."""
        total = plans[-1].stop
        seen = self._policy(keep=False).capacity_frames(self.forcing.pattern)
        return total if seen is None else min(total, seen + total - plans[lead].start)
