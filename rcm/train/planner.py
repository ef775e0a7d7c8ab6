"""Memory and time of a training job before it runs, and how to lay it out so that it fits.

One analytic model: `planner_job` (what the job does), `planner_memory` (bytes), `planner_time`
(seconds), `planner_card` (what a card can do). Nothing is built or allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from rcm.core.errors import ConfigError
from rcm.parallel.checkpointing import MODES
from rcm.train.planner_card import GIB, Card
from rcm.train.planner_job import Job, PhasePlan
from rcm.train.planner_memory import (
    Term,
    held_terms,
    host_bytes,
    pass_terms,
    total,
    update_terms,
)
from rcm.train.planner_time import (
    gather_seconds,
    moving_seconds,
    pass_cost,
    summing_seconds,
    update_seconds,
)

SLACK = 1.06
"""Memory the caching allocator has reserved over what is allocated at the peak."""

OUTSIDE = 1.0 * GIB
"""CUDA context and libraries; as much again for NCCL's buffers on several ranks."""


@dataclass(frozen=True)
class PassPrediction:
    """A pass of a phase and one micro-batch."""

    name: str
    role: str
    mode: str
    bytes: float  # the peak beside the states
    seconds: float
    flops: float  # of the whole context group
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class PhasePrediction:
    """One kind of iteration."""

    role: str
    share: float
    passes: tuple[PassPrediction, ...]
    terms: tuple[Term, ...]  # what is allocated at the peak
    peak: float  # allocated bytes
    fullest: str  # the pass of the peak
    seconds: float  # of the whole iteration
    update_seconds: float


@dataclass(frozen=True)
class Prediction:
    """A job on a card."""

    job: Job
    card: Card
    states: tuple[Term, ...]  # what is there all the time
    phases: tuple[PhasePrediction, ...]
    state_bytes: float
    peak: float  # largest `torch.cuda.max_memory_allocated` of all phases on rank 0
    reserved: float  # the peak with the allocator's slack and what lies outside it
    seconds: float  # mean iteration
    host: float = 0.0  # bytes that rank 0 keeps in host memory

    @property
    def fits(self) -> bool:
        """Whether the card has what must be reserved."""
        return self.reserved <= self.card.gib * GIB

    @property
    def seconds_per_sample(self) -> float:
        """Of wall time, for comparing layouts of one global batch."""
        return self.seconds / self.job.global_batch


def predict(job: Job, card: Card) -> Prediction:
    """Memory and time of `job` as it is laid out."""
    states = tuple(held_terms(job, "card"))
    base = total(states)
    phases = tuple(_phase(job, card, phase, base) for phase in job.phases)
    peak = max(phase.peak for phase in phases)
    reserved = peak * SLACK + OUTSIDE * (2 if job.ranks > 1 else 1)
    seconds = sum(phase.share * phase.seconds for phase in phases)
    return Prediction(job, card, states, phases, base, peak, reserved, seconds, host_bytes(job))


def _phase(job: Job, card: Card, phase: PhasePlan, base: float) -> PhasePrediction:
    passes = []
    kept = job.rolls_gathered(phase)
    for step in phase.passes:
        cost = pass_cost(job, card, step, gathered=kept and step.role == "student")
        terms = tuple(pass_terms(job, phase, step))
        told = (step.name, step.role, step.mode, total(terms), cost.seconds, cost.flops, terms)
        passes.append(PassPrediction(*told))
    moments = [(item.name, item.terms) for item in passes]
    moments.append(("update", tuple(update_terms(job, phase))))
    fullest, terms = max(moments, key=lambda moment: total(moment[1]))
    update = update_seconds(job, card, phase)
    seconds = job.accumulation * sum(item.seconds for item in passes) + update
    seconds += moving_seconds(job, card, phase) + summing_seconds(job, card, phase)
    seconds += job.accumulation * gather_seconds(job, card, "student") * kept
    peak, kind = base + total(terms), (phase.role, phase.share)
    return PhasePrediction(*kind, tuple(passes), terms, peak, fullest, seconds, update)


def layouts(job: Job, *, global_batch: int | None = None) -> Iterator[Job]:
    """Every way to spread `job` over its ranks: context-parallel sizes that divide heads and tokens
    per frame, shard sizes, ways to recompute, with the accumulation that gives `global_batch`
    samples per update (None: as the job has). Layouts with more data ranks than samples are left
    out.
    """
    wanted = job.global_batch if global_batch is None else global_batch
    if wanted < 1:
        raise ConfigError(f"global_batch={wanted} must be at least 1")
    for context in _contexts(job):
        steps, rest = divmod(wanted, job.ranks // context * job.batch)
        if rest or not steps:
            continue
        for shard in (n for n in _divisors(job.ranks) if n % context == 0):
            for mode in MODES:
                laid = replace(job, context=context, shard=shard, accumulation=steps)
                yield laid.with_recompute(mode)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _contexts(job: Job) -> list[int]:
    """Context-parallel sizes that every network can take."""
    passes = [step for phase in job.phases for step in phase.passes]
    counts = {layout.tokens_per_frame for step in passes for layout in step.layouts}
    counts |= {net.config.num_heads for net in job.nets}
    return [n for n in _divisors(job.ranks) if all(count % n == 0 for count in counts)]


Refusal = Callable[[Job], str]
"""Why a run refuses a layout of its job; "" if it takes it."""


def _takes_all(_: Job) -> str:
    return ""


@dataclass(frozen=True)
class Proposal:
    """What the search found among the layouts that the run takes: `best` fits and is the fastest,
    None if nothing fits; `smallest` needs the least memory.
    """

    best: Prediction | None
    smallest: Prediction
    tried: int


def propose(
    job: Job, card: Card, *, global_batch: int | None = None, refusal: Refusal = _takes_all
) -> Proposal:
    """The fastest layout of `job` on its ranks that fits the card. `ConfigError` if no layout gives
    this global batch, or the run refuses all that do.
    """
    found = [predict(laid, card) for laid in layouts(job, global_batch=global_batch)]
    if not found:
        raise ConfigError(
            f"no layout of {job.ranks} ranks with {job.batch} sample(s) each makes a global batch"
            f" of {job.global_batch if global_batch is None else global_batch}; choose a multiple"
            " of the data ranks, or fewer gpus"
        )
    smallest = _first(sorted(found, key=lambda item: item.reserved), refusal)
    if smallest is None:
        raise ConfigError(f"this run takes no layout of {job.ranks} ranks: {refusal(found[0].job)}")
    return Proposal(_fastest(found, refusal), smallest, len(found))


def _fastest(found: Iterable[Prediction], refusal: Refusal) -> Prediction | None:
    """Of those that fit."""
    fitting = [prediction for prediction in found if prediction.fits]
    fitting.sort(key=lambda item: (round(item.seconds_per_sample, 6), item.reserved))
    return _first(fitting, refusal)


def _first(found: Iterable[Prediction], refusal: Refusal) -> Prediction | None:
    return next((item for item in found if not refusal(item.job)), None)


def enough_ranks(
    job: Job, card: Card, *, limit: int = 1024, refusal: Refusal = _takes_all
) -> Prediction | None:
    """The fewest ranks, doubling, on which some layout fits, the global batch growing where it
    must; None up to `limit`.
    """
    ranks = job.ranks
    while ranks < limit:
        ranks *= 2
        wider = replace(job, ranks=ranks, shard=1, context=1, accumulation=1)
        batches = [ranks // context * job.batch for context in _contexts(wider) if context <= 16]
        spread = [laid for batch in batches for laid in layouts(wider, global_batch=batch)]
        if (best := _fastest((predict(laid, card) for laid in spread), refusal)) is not None:
            return best
    return None
