"""What a run must give up to fit a machine: ways to save memory in order of their price, until
some layout fits, and then only those that are needed.

A way is words of the command line, composed as training composes them; one that the run refuses is
passed over. docs/scale.md says what each does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from rcm.configs.compose import Run
from rcm.configs.plan_job import plan_job
from rcm.core.errors import ConfigError
from rcm.train.planner import Prediction, Proposal, propose
from rcm.train.planner_card import CARDS, Card
from rcm.train.planner_job import Job


@dataclass(frozen=True)
class Lever:
    """A way to save memory: words, and what they cost."""

    words: tuple[str, ...]
    price: str
    instead: tuple[str, ...] = ()  # words of a lever that this one takes the place of


LADDER = (
    Lever(("trainer.gradient_sync=each",), "gradients cross the ranks after every term"),
    Lever(("trainer.offload.states=True",), "moments and average cross the bus in every update"),
    Lever(
        ("trainer.offload.idle_roles=True",), "networks cross the bus when another one's turn comes"
    ),
    Lever(("model.config.replayed_training=True",), "the last step of every chunk runs twice"),
    Lever(
        ("trainer.offload.parameters=True",),
        "trained weights cross the bus for every pass, and the host's processor updates them",
        instead=("trainer.offload.states=True",),
    ),
    Lever(
        ("model.config.frozen_weights=fp8_storage",),
        "frozen networks are rounded to e4m3: the one that changes numbers beyond rounding",
    ),
)
"""From the cheapest on; all but the last leave gradients as they are."""

MACHINES = tuple(
    sorted(
        (
            (ranks, CARDS[name])
            for ranks in (1, 2, 4, 8)
            for name in ("rtx4090", "l40s", "h100", "h200")
        ),
        key=lambda machine: (machine[0] * machine[1].gib, machine[0]),
    )
)
"""Cards of 24, 48, 80 and 141 GB, one to eight of a host, by their memory."""

Composer = Callable[[Sequence[str]], Run]
"""The run of these words after those that the user gave."""


@dataclass(frozen=True)
class Found:
    """What a machine needs: `levers`, and what they allow; all levers where no layout fits."""

    levers: tuple[Lever, ...]
    proposal: Proposal

    @property
    def words(self) -> list[str]:
        """Of the levers."""
        return [word for lever in self.levers for word in lever.words]


class Search:
    """Searches for one run, composed once for each choice of levers."""

    def __init__(self, compose: Composer) -> None:
        self._compose = compose
        self._job = cache(self._composed)

    def job(self, levers: tuple[Lever, ...], *, ranks: int) -> Job:
        """The run with `levers`, laid out for any number of ranks. `ConfigError` where it refuses
        them.
        """
        return replace(self._job(levers), ranks=ranks)

    def _composed(self, levers: tuple[Lever, ...]) -> Job:
        return plan_job(alone(self._compose([w for lever in levers for w in lever.words])), ranks=1)

    def found(self, card: Card, *, ranks: int, global_batch: int | None = None) -> Found:
        """The cheapest levers with which some layout fits. `ConfigError` if no layout gives this
        global batch.
        """
        found = self._proposed((), card, ranks=ranks, global_batch=global_batch)
        assert found is not None
        for lever in LADDER:
            if found.proposal.best is not None:
                break
            kept = tuple(other for other in found.levers if other.words != lever.instead)
            more = self._proposed((*kept, lever), card, ranks=ranks, global_batch=global_batch)
            found = found if more is None else more
        for lever in reversed(found.levers) if found.proposal.best is not None else ():
            fewer = tuple(other for other in found.levers if other is not lever)
            less = self._proposed(fewer, card, ranks=ranks, global_batch=global_batch)
            found = less if less is not None and less.proposal.best is not None else found
        return found

    def _proposed(
        self, levers: tuple[Lever, ...], card: Card, *, ranks: int, global_batch: int | None
    ) -> Found | None:
        try:
            job = self.job(levers, ranks=ranks)
        except ConfigError:
            if not levers:
                raise
            return None
        return Found(levers, propose(job, card, global_batch=global_batch))

    def machines(
        self, *, ranks: int | None = None, card: Card | None = None
    ) -> Iterator[tuple[Found, Prediction | None]]:
        """Machines from the smallest on, and what the run is on them; one that fits is the last.
        `ranks`, `card`: machines of so many or of these cards alone.
        """
        for count, other in MACHINES:
            if (ranks or count) != count or (card or other).name != other.name:
                continue
            found = self.found(other, ranks=count)
            yield found, found.proposal.best
            if found.proposal.best is not None:
                return


def alone(run: Run) -> Run:
    """The run laid out for any number of ranks: no shards, no context parallelism."""
    model = replace(run.config.model, config=replace(run.config.model.config, fsdp_shard_size=1))
    parallel = replace(run.config.model_parallel, context_parallel_size=1)
    return replace(run, config=replace(run.config, model=model, model_parallel=parallel))
