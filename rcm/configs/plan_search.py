"""What a run must give up to fit a machine: the cheapest ways to save memory that suffice.

A way is words of the command line. One that the run refuses is passed over, and so is a layout that
its checks refuse. docs/scale.md says what each way does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from rcm.configs.checks import check, check_mesh
from rcm.configs.compose import Run
from rcm.configs.convert import with_key
from rcm.configs.plan_job import plan_job
from rcm.core.errors import ConfigError
from rcm.train.planner import Prediction, Proposal, enough_ranks, propose
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
        ("trainer.keep_gathered_gib=0",), "the student's weights are gathered for every short pass"
    ),
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

_NAMED = sorted((ranks, on.name) for ranks, on in MACHINES)

Composer = Callable[[Sequence[str]], Run]
"""The run of these words after those that the user gave."""


KNOBS = {"student": "model.config.net", "fake_score": "model.config.net_fake_score"}
"""Role that is trained -> its network's key."""


def layout_keys(job: Job) -> dict[str, Any]:
    """Key -> value of this layout; no choice of blocks where none is recomputed."""
    keys: dict[str, Any] = {
        "model.config.fsdp_shard_size": job.shard_ranks,
        "model_parallel.context_parallel_size": job.context,
    }
    for net in (net for net in job.nets if net.trained):
        sac = f"{KNOBS[net.role]}.sac_config"
        if net.recompute == "none" and net.recompute_every != 1:
            keys[f"{sac}.every_n_blocks"] = 1
        if net.recompute == "none" and net.keep_last:
            keys[f"{sac}.keep_last_blocks"] = 0
        keys[f"{sac}.mode"] = net.recompute
    return {**keys, "trainer.grad_accum_iter": job.accumulation}


def words_of(levers: Sequence[Lever], job: Job | None = None) -> list[str]:
    """Words of the command line for levers, and for a layout."""
    keys = {} if job is None else layout_keys(job)
    chosen = [word for lever in levers for word in lever.words]
    return [*chosen, *(f"{key}={value}" for key, value in keys.items())]


def laid_out(run: Run, keys: dict[str, Any]) -> Run:
    """The run with other values of keys. `ConfigError` of a record that cannot have them."""
    config = run.config
    for key, value in keys.items():
        config = with_key(config, key, value)
    return replace(run, config=config)


@dataclass(frozen=True)
class Found:
    """What a machine needs: `levers`, and what they allow; all levers where no layout fits."""

    levers: tuple[Lever, ...]
    proposal: Proposal

    @property
    def words(self) -> list[str]:
        return words_of(self.levers)


class Search:
    """Searches for one run, composed once for each choice of levers."""

    def __init__(self, compose: Composer) -> None:
        self._compose = compose
        self._run, self.refusal = cache(self._composed), cache(self._refusal)

    def job(self, levers: tuple[Lever, ...], *, ranks: int) -> Job:
        """The run with `levers` for any number of ranks; `ConfigError` if it refuses them."""
        return replace(self._run(levers)[1], ranks=ranks)

    def _composed(self, levers: tuple[Lever, ...]) -> tuple[Run, Job]:
        run = laid_out(self._compose(words_of(levers)), ALONE)
        return run, plan_job(run, ranks=1)

    def _refusal(self, levers: tuple[Lever, ...], job: Job) -> str:
        """Why the run with `levers` refuses the layout of `job`; "" if training would take it."""
        try:
            config = laid_out(self._run(levers)[0], layout_keys(job)).config
            check(config)
            check_mesh(config, world_size=job.ranks)
        except ConfigError as error:
            return str(error)
        return ""

    def takes(self, word: str) -> bool:
        """Whether the run can be composed with this word."""
        try:
            self._compose([word])
        except ConfigError:
            return False
        return True

    def found(self, card: Card, *, ranks: int, global_batch: int | None = None) -> Found:
        """The cheapest levers with which a layout fits. `ConfigError` if the run takes no layout of
        this global batch.
        """
        asked = partial(self._proposed, card=card, ranks=ranks, global_batch=global_batch)
        found = asked(())
        for lever in LADDER:
            if found.proposal.best is not None:
                break
            kept = tuple(other for other in found.levers if other.words != lever.instead)
            with suppress(ConfigError):
                found = asked((*kept, lever))
        for lever in reversed(found.levers) if found.proposal.best is not None else ():
            with suppress(ConfigError):
                less = asked(tuple(other for other in found.levers if other is not lever))
                found = found if less.proposal.best is None else less
        return found

    def _proposed(
        self, levers: tuple[Lever, ...], card: Card, *, ranks: int, global_batch: int | None
    ) -> Found:
        job, refusal = self.job(levers, ranks=ranks), partial(self.refusal, levers)
        return Found(levers, propose(job, card, global_batch=global_batch, refusal=refusal))

    def wider(self, found: Found, card: Card, *, ranks: int) -> Prediction | None:
        """The fewest ranks above `ranks` that the levers of `found` suffice for."""
        job = self.job(found.levers, ranks=ranks)
        return enough_ranks(job, card, refusal=partial(self.refusal, found.levers))

    def machines(
        self, *, ranks: int | None = None, card: Card | None = None
    ) -> Iterator[tuple[Found, Prediction | None]]:
        """Machines from the smallest on, and the run on them, until one fits. `ranks`, `card`: only
        machines of those. `ConfigError` if the run takes a layout on none.
        """
        chosen = [
            (count, other)
            for count, other in MACHINES
            if (ranks or count) == count and (card or other).name == other.name
        ]
        if not chosen:
            counts, cards = (dict.fromkeys(map(str, x)) for x in zip(*_NAMED, strict=True))
            raise ConfigError(
                f"--smallest goes through {', '.join(counts)} cards of {', '.join(cards)}; choose"
                " gpus= and gpu= among them, or leave out --smallest"
            )
        refused, seen = None, False
        for count, other in chosen:
            try:
                found = self.found(other, ranks=count)
            except ConfigError as error:
                refused = error
                continue
            seen = True
            yield found, found.proposal.best
            if found.proposal.best is not None:
                return
        if refused is not None and not seen:
            raise refused


ALONE = {"model.config.fsdp_shard_size": 1, "model_parallel.context_parallel_size": 1}
"""Layout for any number of ranks: no shards, no context parallelism."""
