"""What a rollout does, decided before it runs: frames, times and context of every chunk.

Plans are pure functions of host numbers (pattern, schedule, global step), so every rank issues the
same network calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds, require_kind
from rcm.diffusion.blocks import BlockPattern
from rcm.samplers.schedule import few_step_grid

Commit = Literal["clean", "last_input", "renoised"]


@dataclass(frozen=True)
class StepSchedule:
    """Mid times per chunk: chunk i takes entry min(i, last) and makes len(entry) + 1 steps.

    `StepSchedule(((15/16, 5/6, 5/8), (5/6,)))` is the 2-step preset: 4 steps in chunk 0, 2 steps in
    later chunks.
    """

    mids: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.mids:
            raise ConfigError(
                "a step schedule needs at least one entry of mid times (an empty entry () means one"
                " step)"
            )
        for entry in self.mids:
            few_step_grid(entry, first=1.0)

    def entry(self, chunk: int) -> tuple[float, ...]:
        """Mid times of generated chunk `chunk` (the last entry repeats)."""
        return self.mids[min(chunk, len(self.mids) - 1)]

    def steps(self, chunk: int) -> int:
        """Number of denoising steps of generated chunk `chunk`."""
        return len(self.entry(chunk)) + 1

    def context_time(self, chunk: int) -> float:
        """RF time of noisy context of chunk `chunk`: its last mid time, 1 without any."""
        entry = self.entry(chunk)
        return entry[-1] if entry else 1.0

    @classmethod
    def from_lists(
        cls,
        *,
        steps: Sequence[int],
        schedules: Sequence[Sequence[float]],
        default_mids: Sequence[float],
        knob: str = "steps_per_chunk",
    ) -> StepSchedule:
        """Schedule from the two lists users write. No `schedules`: every entry is a prefix of
        `default_mids`. Extra mid times are cut off.
        """
        if schedules and not steps:
            raise ConfigError(
                f"mid-time schedules were given without {knob}; give one step count per schedule"
            )
        if schedules and len(schedules) != len(steps):
            raise ConfigError(
                f"{len(schedules)} mid-time schedules for {len(steps)} entries of"
                f" {knob}={list(steps)}; give one schedule per entry"
            )
        mids = []
        for i, num in enumerate(steps):
            require_kind(f"{knob}[{i}]", num, int)
            if num < 1:
                raise ConfigError(f"{knob}[{i}]={num} must be at least 1")
            source = tuple(schedules[i]) if schedules else tuple(default_mids)
            if len(source) < num - 1:
                raise ConfigError(
                    f"Need {num - 1} mid_t values for {num} steps, got {len(source)} (entry {i} of"
                    f" {knob})"
                )
            mids.append(source[: num - 1])
        return cls(tuple(mids))

    def require_non_increasing(self, knob: str) -> None:
        """Training refuses growing step counts: the cycle of counts is that of chunk 0."""
        counts = [len(entry) + 1 for entry in self.mids]
        if any(b > a for a, b in pairwise(counts)):
            raise ConfigError(
                f"{knob}={counts} increases; step counts per chunk must be non-increasing in"
                " training"
            )


@dataclass(frozen=True)
class ContextRule:
    """Noisy context: chunks >= start_chunk leave KV of their last input, not of a clean pass."""

    noisy: bool = False
    start_chunk: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.start_chunk < 0:
            raise ConfigError(f"context_from_last_step_start_chunk={self.start_chunk} must be >= 0")

    def applies(self, block: int) -> bool:
        """Whether block `block` (an image prefix is block 0) leaves noisy context."""
        return self.noisy and block >= self.start_chunk


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk: latent frames [start, stop), decreasing times (last 0), commit to the cache.

    commit "clean" appends x0 at time 0; "last_input" appends the last denoising input at its own
    time; "renoised" re-noises x0 to `commit_time`.
    """

    block: int
    start: int
    stop: int
    times: tuple[float, ...]
    commit: Commit
    commit_time: float

    @property
    def num_steps(self) -> int:
        """Denoising evaluations (the commit pass not counted)."""
        return len(self.times) - 1


def block_plan(
    pattern: BlockPattern,
    block: int,
    times: tuple[float, ...],
    *,
    context: ContextRule = ContextRule(),
) -> ChunkPlan:
    """Plan of one block along `times`, of a video however long."""
    noisy = context.applies(block)
    start, stop = pattern.frames_before(block), pattern.frames_before(block + 1)
    return ChunkPlan(
        block, start, stop, times, "last_input" if noisy else "clean", times[-2] if noisy else 0.0
    )


def training_plan(
    pattern: BlockPattern,
    num_frames: int,
    schedule: StepSchedule,
    *,
    index: int,
    context: ContextRule = ContextRule(),
) -> tuple[ChunkPlan, ...]:
    """Self-forcing rollout of effective update `index` (Causal_rCM.md section 6).

    n = index mod (steps of chunk 0) + 1; chunk i makes min(n, its maximum) steps along a prefix of
    its schedule, starting at exactly t = 1. Noisy context: a chunk at its maximum leaves its last
    input; a shorter one is re-noised to the last time of its full schedule (1 if empty).
    """
    count = index % schedule.steps(0) + 1
    plans = []
    for block, (start, stop) in enumerate(pattern.bounds(num_frames)):
        entry = schedule.entry(block)
        steps = min(count, len(entry) + 1)
        times = few_step_grid(entry[: steps - 1], first=1.0)
        commit: Commit
        if not context.applies(block):
            commit, commit_time = "clean", 0.0
        elif steps == len(entry) + 1:
            commit, commit_time = "last_input", times[-2]
        else:
            commit, commit_time = "renoised", schedule.context_time(block)
        plans.append(ChunkPlan(block, start, stop, times, commit, commit_time))
    return tuple(plans)
