"""One chunk loop for training and streaming: denoise against the cache, hand out, commit.

What varies is a value: the plan (steps, times, context rule), the step rule (consistency or Euler),
where gradient is kept, the cache and the policy that decides what of it is seen. An engine that
captures passes overrides `ChunkLoop.advance` alone. Causal-rCM sections 4, 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.nets.condition import Condition
from rcm.nets.kv_view import CachedChunk
from rcm.nets.layout import TokenLayout
from rcm.nets.paired_cache import Cache, View
from rcm.nets.velocity_model import VelocityModel
from rcm.rollout.eviction.base import CachePolicy, Placement
from rcm.rollout.noise import Noise
from rcm.rollout.plan import ChunkPlan
from rcm.samplers.steps import StepRule

Grad = Literal["none", "last_step"]
"""Where a rollout keeps gradient: nowhere, or in the last step of every chunk."""


@dataclass(frozen=True)
class Canvas:
    """The token grid (h, w) of a frame, and the policy that says what a chunk sees."""

    grid: tuple[int, int]
    policy: CachePolicy = CachePolicy()

    def layout(self, frame_index: tuple[int, ...], view: View) -> TokenLayout:
        """Layout of a chunk whose frames stand at `frame_index`, over what `view` shows."""
        return TokenLayout.over_cache(
            frame_index, grid=self.grid, context_tokens=view.prefix_tokens
        )


@dataclass(frozen=True)
class ChunkResult:
    """A finished chunk: x0 [B, C, frames, H, W], its last step's input and RF time, its place.

    `committed`: its context is in the cache already, left by its last step.
    """

    plan: ChunkPlan
    x0: Tensor
    last_input: Tensor
    last_time: float
    placement: Placement
    committed: bool = False


def time_tensor(t: float, batch: int, device: torch.device) -> Tensor:
    """RF time `t` as the float64 [B, 1] tensor that denoisers take."""
    return torch.full((batch, 1), t, dtype=torch.float64, device=device)


class ChunkLoop:
    """The state of a rollout between chunks: a cache from `denoiser.new_cache`, and what fills it.

    `grad="last_step"` keeps the graph of each chunk's last step only; the committed context is
    always detached, so no gradient crosses chunks. `in_place` uses the cache's transient writes
    (inference). `interrupt` is called before every pass and may raise to stop. `watch`, where it is
    set, is shown what every denoising step made. `ConfigError` for a policy that wants
    other keys than `cache` holds, turns them at other rates than the network does, or chooses
    tokens by the heads of one rank of several.
    """

    def __init__(
        self,
        denoiser: VelocityModel,
        *,
        canvas: Canvas,
        noise: Noise,
        rule: StepRule,
        cache: Cache,
        grad: Grad = "none",
        in_place: bool = False,
        interrupt: Callable[[], None] | None = None,
    ) -> None:
        require_kind("grad", grad, Grad)
        _require_fitting(canvas.policy, denoiser, cache)
        self.denoiser, self.canvas, self.noise, self.rule = denoiser, canvas, noise, rule
        self.cache = cache
        self.grad, self.in_place, self.interrupt = grad, in_place, interrupt
        self.watch: Callable[[Tensor], None] | None = None
        self.newest: int | None = None  # id of the chunk that was appended last

    def denoise(self, plan: ChunkPlan, cond: Condition, *, keep: bool = True) -> ChunkResult:
        """Generate the chunk of `plan`. `keep`: its context will be needed. Where that is the last
        input, the last step writes it as well, except with gradient and with mean velocities: such
        a step looks down to t_next, context no further than its own time.
        """
        frames = slice(plan.start, plan.stop)
        placement = self.place(plan)
        x = self.noise.start(frames) * plan.times[0]
        fuse = keep and self.grad == "none" and plan.commit == "last_input" and not self.rule.mean
        for step, (t, t_next) in enumerate(zip(plan.times[:-1], plan.times[1:], strict=True)):
            last = step == plan.num_steps - 1
            noise = self.noise.step(step, frames) if self.rule.needs_noise and t_next > 0 else None
            with torch.set_grad_enabled(
                last and self.grad == "last_step" and torch.is_grad_enabled()
            ):
                x_next = self.advance(
                    x, cond, placement, t=t, t_next=t_next, noise=noise, append=last and fuse
                )
            if self.watch is not None:
                self.watch(x_next)
            if last:
                if fuse:
                    self.settle(plan)
                return ChunkResult(plan, x_next, x, t, placement, committed=fuse)
            x = x_next
        raise AssertionError("a plan has at least one step")

    @torch.no_grad()
    def commit(self, result: ChunkResult, cond: Condition) -> tuple[Tensor, float]:
        """Append the context of a finished chunk, unless it is there already: clean, as last seen,
        or re-noised; returns it and its time.
        """
        plan = result.plan
        if result.committed:
            return result.last_input, result.last_time
        if plan.commit == "clean":
            x, t = result.x0, 0.0
        elif plan.commit == "last_input":
            x, t = result.last_input, result.last_time
        else:
            t = plan.commit_time
            x = (1.0 - t) * result.x0 + t * self.noise.context(slice(plan.start, plan.stop))
        self.fill(
            x.detach(), cond, self._append(result.placement), result.placement.frame_index, t=t
        )
        self.settle(plan)
        return x, t

    @torch.no_grad()
    def prefill(self, x: Tensor, plan: ChunkPlan, cond: Condition, *, t: float) -> None:
        """Append given frames as the block of `plan`: `x` [B, C, frames, H, W] at RF time `t`."""
        placement = self.place(plan)
        self.fill(x.detach(), cond, self._append(placement), placement.frame_index, t=t)
        self.settle(plan)

    @torch.no_grad()
    def refill(self, chunks: Sequence[tuple[CachedChunk, Tensor, float]], cond: Condition) -> None:
        """Enter cached chunks anew under `cond`, oldest first, each under its id and at its
        positions: (chunk, its latents, their RF time). They are the newest ones, all but what the
        policy protects.

        Raises `ValueError`, before anything is changed, for a chunk that lost tokens: its frames
        have no positions of their own any more.
        """
        places = [chunk.positions.frames for chunk, _, _ in chunks]
        if None in places:
            lost = chunks[places.index(None)][0].id
            raise ValueError(
                f"chunk {lost} holds chosen tokens, not whole frames, so it cannot be entered again"
            )
        caches, policy = self.cache.branches, self.canvas.policy
        for cache in caches:
            cache.evict([chunk.id for chunk, _, _ in chunks])
        policy.forget(caches, [chunk for chunk, _, _ in chunks])
        for (chunk, x, t), frames in zip(chunks, places, strict=True):
            hidden = policy.hidden(caches)
            visible = tuple(held.id for held in caches[0].chunks if held.id not in hidden)
            self._may_go_on()
            view = self.cache.append(visible, observers=policy.observers(caches), as_id=chunk.id)
            self.fill(x, cond, view, cast(tuple[int, ...], frames), t=t)
            policy.again(caches)

    def captured_for(self) -> Condition | None:
        """A condition whose shapes all others must have, None where passes are not captured."""
        return None

    def restart(self, *, canvas: Canvas, noise: Noise) -> None:
        """Begin another video in the memory of this one."""
        self.cache.reset(free_buffers=False)
        self.canvas, self.noise, self.newest = canvas, noise, None

    def state(self) -> dict[str, Any]:
        """What the next chunk depends on, as copies."""
        return {
            "newest": self.newest,
            "caches": [cache.state() for cache in self.cache.branches],
            "policy": self.canvas.policy.state(),
            "noise": self.noise.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a `state` of a loop made alike."""
        self.newest = state["newest"]
        for cache, held in zip(self.cache.branches, state["caches"], strict=True):
            cache.load_state(held)
        self.canvas.policy.load_state(state["policy"])
        self.noise.load_state(state["noise"])

    def close(self) -> None:
        self.cache.reset()

    def place(self, plan: ChunkPlan) -> Placement:
        """Ask the policy what the chunk sees."""
        return self.canvas.policy.before(self.cache.branches, plan)

    def settle(self, plan: ChunkPlan) -> None:
        """Tell the policy that the chunk is in the cache."""
        self.newest = self.cache.branches[0].chunks[-1].id
        self.canvas.policy.after(self.cache.branches, plan)

    def advance(
        self,
        x: Tensor,
        cond: Condition,
        placement: Placement,
        *,
        t: float,
        t_next: float,
        noise: Tensor | None,
        append: bool,
    ) -> Tensor:
        """One denoising step from RF time `t` to `t_next`; `append` keeps it in the cache."""
        view = self.view(placement, append=append)
        layout = self.canvas.layout(placement.frame_index, view)
        now, then = (time_tensor(time, x.shape[0], x.device) for time in (t, t_next))
        return self.rule(
            x, self.ask(x, now, then, cond, layout, view), t=t, t_next=t_next, noise=noise
        )

    def ask(
        self, x: Tensor, t: Tensor, t_next: Tensor, cond: Condition, layout: TokenLayout, view: View
    ) -> Tensor:
        """The velocity that the rule of a step from `t` to `t_next` wants."""
        if self.rule.mean:
            return self.denoiser.mean_velocity(x, t, t_next, cond, layout, cache=view)
        return self.denoiser.velocity(x, t, cond, layout, cache=view)

    def fill(
        self, x: Tensor, cond: Condition, view: View, frame_index: tuple[int, ...], *, t: float
    ) -> None:
        """One pass whose only result is its context."""
        layout = self.canvas.layout(frame_index, view)
        self.denoiser.enter_context(
            x, time_tensor(t, x.shape[0], x.device), cond, layout, cache=view
        )

    def view(self, placement: Placement, *, append: bool) -> View:
        if append:
            return self._append(placement)
        self._may_go_on()
        return self.cache.readonly(visible=placement.visible, transient=self.in_place)

    def _may_go_on(self) -> None:
        if self.interrupt is not None:
            self.interrupt()

    def _append(self, placement: Placement) -> View:
        self._may_go_on()
        return self.cache.append(
            placement.visible, observers=self.canvas.policy.observers(self.cache.branches)
        )


def _require_fitting(policy: CachePolicy, denoiser: VelocityModel, cache: Cache) -> None:
    name, ntk = type(policy).__name__, getattr(policy, "ntk_time", None)
    if not policy.any_keys and (held := cache.branches[0].keys) != policy.keys:
        raise ConfigError(
            f"{name} needs a cache with keys={policy.keys!r}, got {held!r}; make it with"
            " new_cache(keys=)"
        )
    if ntk is not None and ntk != (rates := denoiser.rope.ntk[0]):
        raise ConfigError(
            f"{name}(ntk_time={ntk:g}) would turn keys by other angles than the network, whose"
            f" time axis has the NTK ratio {rates:g}; make it with ntk_time={rates:g}"
        )
    if getattr(policy, "reduce", ...) is None and (ranks := denoiser.num_ranks) > 1:
        raise ConfigError(
            f"{name} chooses by all heads, and each of {ranks} ranks has some of them; make it with"
            " reduce=, their sum over the ranks"
        )


def rollout(
    denoiser: VelocityModel,
    cond: Condition,
    plans: Iterable[ChunkPlan],
    *,
    canvas: Canvas,
    noise: Noise,
    rule: StepRule,
    cache: Cache,
    grad: Grad = "none",
    commit_last: bool = True,
) -> Iterator[ChunkResult]:
    """Generate the chunks of `plans` in order, one `ChunkResult` each; `grad` as in `ChunkLoop`.

    `cache` already holds every block before the first plan's (see `ChunkLoop.prefill`).
    `commit_last=False` skips the context pass of the final chunk, which nothing reads.
    """
    loop = ChunkLoop(denoiser, canvas=canvas, noise=noise, rule=rule, cache=cache, grad=grad)
    upcoming = iter(plans)
    plan = next(upcoming, None)
    while plan is not None:
        following = next(upcoming, None)
        commits = commit_last or following is not None
        result = loop.denoise(plan, cond, keep=commits)
        yield result
        if commits:
            loop.commit(result, cond)
        plan = following
