"""How to sample a causal checkpoint: a record stored with the weights, which makes plans.

Sampling from a checkpoint needs only its path because this record is stored beside it; a sampler
that contradicts it is refused unless forced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.guidance import is_guided
from rcm.diffusion.time import check_shift
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.plan import ChunkPlan, ContextRule, StepSchedule, block_plan
from rcm.samplers.schedule import CAUSAL_MID_TIMES, few_step_grid, initial_time, shifted_grid
from rcm.samplers.steps import ConsistencyStep, EulerStep, FlowMapStep, StepRule

KINDS = ("few_step", "flow_map", "ode")
"""How a causal network is sampled; see `SamplingRecipe`."""


@dataclass(frozen=True)
class SamplingRecipe(Record):
    """Sampling of a causal network.

    kind "few_step": consistency steps along `mids` (per chunk, last repeats; see StepSchedule).
    kind "flow_map": along the same times the jumps x_s = x_t - (t - s) u(x_t, t, s) of a network
    with two times, without renoising. kind "ode": Euler over `ode_steps` with `shift` and guidance.
    `pattern` is a name such as "c3-3"; `sigma_max` sets the first time sigma/(sigma+1). `window`,
    `sinks`: what a chunk was trained to see, in blocks (`SlidingWindow`); None: all of the past.
    """

    kind: Literal["few_step", "flow_map", "ode"]
    pattern: str
    mids: tuple[tuple[float, ...], ...] = (CAUSAL_MID_TIMES,)
    sigma_max: float = within(1600.0, above=0)
    noisy_context: bool = False
    noisy_context_start_chunk: int = within(0, least=0)
    ode_steps: int = within(50, least=1)
    shift: float = 3.0
    guidance: float = 1.0
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shift(self.shift)
        BlockPattern.parse(self.pattern)
        StepSchedule(self.mids)
        if self.kind == "flow_map" and is_guided(self.guidance):
            raise ConfigError(
                f"guidance={self.guidance:g} (--guidance_scale) would combine two passes; jumps"
                " have the guidance of the teacher that they were learned from, leave it at 1"
            )
        if self.window is not None:
            SlidingWindow(self.window, self.sinks)
        elif self.sinks:
            raise ConfigError(
                f"sinks={self.sinks} are what stays visible beyond a window; give window, or leave"
                " sinks at 0"
            )

    @property
    def policy(self) -> CachePolicy:
        """What of the past is kept and seen, as trained."""
        return CachePolicy() if self.window is None else SlidingWindow(self.window, self.sinks)

    @property
    def blocks(self) -> BlockPattern:
        return BlockPattern.parse(self.pattern)

    @property
    def rule(self) -> StepRule:
        rules: dict[str, StepRule] = {
            "few_step": ConsistencyStep(),
            "flow_map": FlowMapStep(),
            "ode": EulerStep(),
        }
        return rules[self.kind]

    def plan(self, block: int, *, prefix_blocks: int = 0) -> ChunkPlan:
        """Plan of block `block` after `prefix_blocks` given ones; `ValueError` for one of them. The
        schedule counts generated chunks, the context rule all blocks.
        """
        if block < prefix_blocks:
            raise ValueError(f"block {block} is one of the {prefix_blocks} given ones")
        context = ContextRule(self.noisy_context, self.noisy_context_start_chunk)
        if self.kind == "ode":
            times = shifted_grid(self.ode_steps, shift=self.shift, sigma_max=self.sigma_max)
        else:
            mids = StepSchedule(self.mids).entry(block - prefix_blocks)
            times = few_step_grid(mids, first=initial_time(self.sigma_max))
        return block_plan(self.blocks, block, times, context=context)

    def plans(self, num_frames: int, *, prefix_blocks: int = 0) -> tuple[ChunkPlan, ...]:
        """Plans of `num_frames` latent frames, `prefix_blocks` given; errors as `num_blocks`."""
        return tuple(
            self.plan(block, prefix_blocks=prefix_blocks)
            for block in range(prefix_blocks, self.blocks.num_blocks(num_frames))
        )

    def with_steps(
        self, *steps: int, schedules: Sequence[Sequence[float]] = (), knob: str = "steps_per_chunk"
    ) -> SamplingRecipe:
        """The recipe with other step counts per chunk (last repeats), each with a schedule.

        Without `schedules` entry i takes the first times of chunk i's own schedule, which the
        checkpoint was trained at; one that is too short for the count, those of the longest known
        schedule. Raises `ConfigError`, naming `knob`, as `StepSchedule.from_lists`.
        """
        if not schedules:
            own, longest = StepSchedule(self.mids), max((*self.mids, CAUSAL_MID_TIMES), key=len)
            entries = [own.entry(i) for i in range(len(steps))]
            schedules = [
                entry if len(entry) >= num - 1 else longest
                for entry, num in zip(entries, steps, strict=True)
            ]
        schedule = StepSchedule.from_lists(
            steps=steps, schedules=schedules, default_mids=(), knob=knob
        )
        return replace(
            self, kind="flow_map" if self.kind == "flow_map" else "few_step", mids=schedule.mids
        )

    def contradictions(self, trained: SamplingRecipe) -> list[str]:
        """What a checkpoint trained for `trained` does not support, a sentence each, or none.

        Fewer or other step counts are a supported use (the 2-step checkpoint is sampled in 1 step);
        another pattern, kind or context is not.
        """
        found = []
        knobs = {
            "pattern": "first_chunk_t / chunk_t",
            "kind": "--distilled",
            "noisy_context": "--context_from_last_step",
            "window": "SamplingRecipe.window",
            "sinks": "SamplingRecipe.sinks",
        }
        for name, knob in knobs.items():
            mine, theirs = getattr(self, name), getattr(trained, name)
            if mine != theirs:
                found.append(
                    f"{name}: the checkpoint was trained for {theirs!r}, the sampler asks for"
                    f" {mine!r} ({knob})"
                )
        mine, theirs = self.mids[-1][-1:], trained.mids[-1][-1:]
        if self.noisy_context and trained.noisy_context and mine != theirs:
            found.append(
                f"noisy-context time: trained at {theirs}, sampler uses {mine} (mid_t_schedules)"
            )
        return found

    def require_compatible(self, trained: SamplingRecipe, *, allow: bool = False) -> list[str]:
        """Raise `ConfigError` on contradictions unless `allow`; returns them for the log."""
        found = self.contradictions(trained)
        if found and not allow:
            raise ConfigError(
                "the sampler contradicts the checkpoint: "
                + "; ".join(found)
                + ". Pass --ignore_recipe to sample anyway"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dict; of a window only where there is one."""
        absent = ("window", "sinks") if self.window is None else ()
        return {key: value for key, value in asdict(self).items() if key not in absent}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SamplingRecipe:
        """Inverse of `to_dict`; unknown keys raise `ConfigError`."""
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"sampling recipe has unknown keys {sorted(unknown)}; known:"
                f" {sorted(cls.__dataclass_fields__)}"
            )
        fields = dict(data)
        if "mids" in fields:
            fields["mids"] = tuple(tuple(float(t) for t in entry) for entry in fields["mids"])
        return cls(**fields)
