"""Memory and time of a training job before it runs, and how to lay it out so that it fits.

One analytic model: `planner_job` (what the job does), `planner_memory` (bytes), `planner_time` (seconds), `planner_card` (what a card can
do). Nothing is built or allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from rcm.core.errors import ConfigError
from rcm.train.planner_card import GIB, Card
from rcm.train.planner_job import Job, PhasePlan, Recompute
from rcm.train.planner_memory import Term, pass_terms, state_terms
from rcm.train.planner_time import pass_flops, pass_seconds, phase_seconds, update_seconds

ALL_MODES: tuple[Recompute, ...] = get_args(Recompute)
"""Every way to recompute, most memory first."""

SLACK = 1.06
"""Memory the caching allocator has reserved over what is allocated at the peak."""

OUTSIDE = 1.0 * GIB
"""CUDA context and libraries; as much again for NCCL's buffers on several ranks."""


@dataclass(frozen=True)
class PassPrediction:
    """A pass of a phase: its peak beside the states, its seconds and FLOPs (one micro-batch, whole context group)."""

    name: str
    role: str
    mode: str
    bytes: float
    seconds: float
    flops: float
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class PhasePrediction:
    """One kind of iteration: `peak` allocated bytes, and what is allocated then; `seconds` of the whole iteration."""

    role: str
    share: float
    passes: tuple[PassPrediction, ...]
    terms: tuple[Term, ...]
    peak: float
    fullest: str
    seconds: float
    update_seconds: float


@dataclass(frozen=True)
class Prediction:
    """A job on a card. `peak`: largest `torch.cuda.max_memory_allocated` of all phases on rank 0; `reserved`: with the allocator's slack
    and what lies outside it; `fits` compares that with the card. `seconds`: mean iteration.
    """

    job: Job
    card: Card
    states: tuple[Term, ...]
    phases: tuple[PhasePrediction, ...]

    @property
    def state_bytes(self) -> float:
        """Bytes that are there all the time."""
        return sum(term.bytes for term in self.states)

    @property
    def peak(self) -> float:
        """Allocated bytes at the fullest moment."""
        return max(phase.peak for phase in self.phases)

    @property
    def reserved(self) -> float:
        """What the card must have."""
        return self.peak * SLACK + OUTSIDE * (2 if self.job.ranks > 1 else 1)

    @property
    def fits(self) -> bool:
        """Whether the card has it."""
        return self.reserved <= self.card.gib * GIB

    @property
    def seconds(self) -> float:
        """Mean over the kinds of iterations."""
        return sum(phase.share * phase.seconds for phase in self.phases)

    @property
    def seconds_per_sample(self) -> float:
        """Of wall time, for comparing layouts of one global batch."""
        return self.seconds / self.job.global_batch


def predict(job: Job, card: Card) -> Prediction:
    """Memory and time of `job` as it is laid out."""
    states = tuple(state_terms(job))
    base = sum(term.bytes for term in states)
    return Prediction(job, card, states, tuple(_phase(job, card, phase, base) for phase in job.phases))


def _phase(job: Job, card: Card, phase: PhasePlan, base: float) -> PhasePrediction:
    passes = []
    for step in phase.passes:
        terms = tuple(pass_terms(job, phase, step))
        size = sum(term.bytes for term in terms)
        timing = pass_seconds(job, card, step)
        passes.append(PassPrediction(step.name, step.role, step.mode, size, timing, pass_flops(job, step), terms))
    fullest = max(passes, key=lambda item: item.bytes)
    return PhasePrediction(
        role=phase.role,
        share=phase.share,
        passes=tuple(passes),
        terms=fullest.terms,
        peak=base + fullest.bytes,
        fullest=fullest.name,
        seconds=phase_seconds(job, card, phase),
        update_seconds=update_seconds(job, card, phase),
    )


def layouts(job: Job, *, global_batch: int | None = None, modes: Sequence[Recompute] = ALL_MODES) -> Iterator[Job]:
    """Every way to spread `job` over its ranks: context-parallel sizes that divide heads and tokens per frame, shard sizes, recompute
    `modes`, with the accumulation that gives `global_batch` samples per update (None: as the job has). Layouts with more data ranks than
    samples are left out.
    """
    wanted = job.global_batch if global_batch is None else global_batch
    if wanted < 1:
        raise ConfigError(f"global_batch={wanted} must be at least 1")
    divisors = [n for n in range(1, job.ranks + 1) if job.ranks % n == 0]
    for context in (n for n in divisors if _divides_networks(job, n)):
        per_step = job.ranks // context * job.batch
        if per_step > wanted or wanted % per_step:
            continue
        for shard in (n for n in divisors if n % context == 0):
            for mode in modes:
                yield replace(job.with_recompute(mode), context=context, shard=shard, accumulation=wanted // per_step)


def _divides_networks(job: Job, context: int) -> bool:
    frames = {layout.tokens_per_frame for phase in job.phases for step in phase.passes for layout in step.layouts}
    return all(net.config.num_heads % context == 0 for net in job.nets) and all(tokens % context == 0 for tokens in frames)


@dataclass(frozen=True)
class Proposal:
    """What the search found: `best` fits and is the fastest, None if nothing fits; `smallest` needs the least memory."""

    best: Prediction | None
    smallest: Prediction
    tried: int


def propose(job: Job, card: Card, *, global_batch: int | None = None, modes: Sequence[Recompute] = ALL_MODES) -> Proposal:
    """The fastest layout of `job` on its ranks that fits the card. `ConfigError` if no layout gives this global batch."""
    found = [predict(candidate, card) for candidate in layouts(job, global_batch=global_batch, modes=modes)]
    if not found:
        raise ConfigError(
            f"no layout of {job.ranks} ranks with {job.batch} sample(s) each makes a global batch of "
            f"{job.global_batch if global_batch is None else global_batch}; choose a multiple of the data ranks, or fewer gpus"
        )
    fitting = [prediction for prediction in found if prediction.fits]
    best = min(fitting, key=lambda item: (round(item.seconds_per_sample, 6), item.reserved), default=None)
    return Proposal(best, min(found, key=lambda item: item.reserved), len(found))


def enough_ranks(job: Job, card: Card, *, limit: int = 1024, modes: Sequence[Recompute] = ALL_MODES) -> Prediction | None:
    """The fewest ranks, doubling, on which some layout fits, the global batch growing where it must; None up to `limit`."""
    ranks = job.ranks
    while ranks < limit:
        ranks *= 2
        wider = replace(job, ranks=ranks, shard=1, context=1, accumulation=1)
        spread = (c for n in _contexts(wider) for c in layouts(wider, global_batch=ranks // n * job.batch, modes=modes))
        fitting = [found for candidate in spread if (found := predict(candidate, card)).fits]
        if fitting:
            return min(fitting, key=lambda item: item.seconds_per_sample)
    return None


def _contexts(job: Job) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16) if job.ranks % n == 0 and _divides_networks(job, n)]
