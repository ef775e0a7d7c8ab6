"""Which rank the others wait for, and why: each rank's own seconds of an iteration, compared once
in a while.

The length of an iteration does not tell: ranks meet in every gather of parameters, so it is the
same on all of them whoever is slow. Compared is what no other rank is waited for in: the seconds in
which a rank reads its data, those in which it copies or writes its part of a checkpoint, and those
that a product of fixed size takes on its device. The slowest device sets the time of what remains
of an iteration; a quicker one has its share of it to itself.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from rcm.core.records import Record, within
from rcm.parallel.agree import naming_lost_peers, spread
from rcm.train.state import TrainState

PARTS = ("data", "compute", "checkpoint")
"""What an iteration is split into."""

_CAUSES = (
    "its files answer slowly (dataloader_train.num_workers reads more at a time)",
    "its card or processor is slower: heat, clocks, another program on it",
    "its disk or its copies to the host are slow",
)
_PRODUCTS, _ROUNDS = 8, 5


@dataclass(frozen=True)
class StragglersConfig(Record):
    """A comparison of all ranks, as `Stragglers/...` in the log."""

    # iterations between two comparisons, best a multiple of logging_iter; 0 = never
    every_n: int = within(0, least=0, most=10**12)
    # a rank whose own time of an iteration is so much above the median rank's is slow
    percent: float = within(20.0, above=0, most=1e6)
    # comparisons in a row that a rank is slow in before a warning names it
    intervals: int = within(3, least=1, most=10**6)


class OwnTime:
    """Seconds of this rank's own work: `data` and `checkpoint`, without any wait for another."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = {"data": 0.0, "checkpoint": 0.0}

    @contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """Count the block's time to `part`."""
        begun = self._clock()
        try:
            yield
        finally:
            self._seconds[part] += self._clock() - begun

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        found, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return found


class SpeedProbe:
    """Seconds that a device takes for products of a fixed size, a few milliseconds of work in all;
    the median of a few rounds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._size, self._dtype = (
            (4096, torch.bfloat16) if device.type == "cuda" else (192, torch.float32)
        )

    def __call__(self) -> float:
        x = torch.linspace(-1, 1, self._size**2, device=self.device)
        x = x.view(self._size, self._size).to(self._dtype)
        rounds = []
        for _ in range(_ROUNDS + 1):
            self._settle()
            begun = time.perf_counter()
            for _ in range(_PRODUCTS):
                x @ x
            self._settle()
            rounds.append(time.perf_counter() - begun)
        return statistics.median(rounds[1:]) / _PRODUCTS

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def own_seconds(seconds: Tensor, data: Tensor, checkpoint: Tensor, probe: Tensor) -> Tensor:
    """Own time of every rank, [R, PARTS]: `data` and `checkpoint` as they are, and of what the
    slowest of both leave of an iteration, `probe` over the largest probe.

    All [R] float64; `seconds` of an iteration, as each rank saw it (their median counts).
    """
    rest = (seconds.median() - data.max() - checkpoint.max()).clamp(min=0)
    return torch.stack([data, rest * probe / probe.max(), checkpoint], dim=1)


class Stragglers:
    """Every `every` iterations, the slowest and the median rank: `Stragglers/slowest_rank`,
    `slowest_over_median`, and `slowest_` and `median_` data, compute, checkpoint (seconds of an
    iteration; those of the two ranks).

    A rank that was the slowest and above the median by `percent` in `intervals` comparisons in a
    row is named in a warning, once until it keeps up again. `own`: what trainer and checkpointer
    count; checkpoints, which are rarer than comparisons, as their mean since the start. A
    comparison costs one gather of four numbers over the CPU's group, and `probe`.
    """

    def __init__(
        self,
        own: OwnTime,
        *,
        every: int,
        device: torch.device,
        percent: float = 20.0,
        intervals: int = 3,
        probe: Callable[[], float] | None = None,
        gather: Callable[[list[float]], Tensor] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every, self.percent, self.intervals = every, percent, intervals
        self._own, self._clock = own, clock
        self._probe, self._gather = probe or SpeedProbe(device), gather or _of_all_ranks
        self._name = f"{socket.gethostname()} {device}"
        self._names: list[str] = []
        self._since = (0, 0.0)
        self._first, self._saving = 0, 0.0  # since the start: its iteration, seconds of saving
        self._slow, self._times = -1, 0  # the last slow rank, comparisons in a row

    def started(self, state: TrainState) -> None:
        """Learn the ranks' names; the first interval begins. Collective."""
        self._names = [self._name]
        if spread():
            found: list[str] = [""] * dist.get_world_size()
            with naming_lost_peers():
                dist.all_gather_object(found, self._name)
            self._names = found
        self._first, self._saving = state.iteration, 0.0
        self._own.take()
        self._since = (state.iteration, self._clock())

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """Compare when it is time; the same numbers on every rank. Collective."""
        count = state.iteration - self._since[0]
        if state.iteration % self.every or not count:
            return {}
        own, seconds = self._own.take(), self._clock() - self._since[1]
        self._saving += own["checkpoint"]
        saving = self._saving / (state.iteration - self._first)
        figures = [seconds / count, own["data"] / count, saving, self._probe()]
        parts = own_seconds(*self._gather(figures).unbind(dim=1))
        totals = parts.sum(dim=1)
        slowest, middle = int(totals.argmax()), int(totals.median(dim=0).indices)
        self._judge(parts, slowest, middle, iteration=state.iteration, tell=is_main)
        self._since = (state.iteration, self._clock())
        found = {
            "Stragglers/slowest_rank": float(slowest),
            "Stragglers/slowest_over_median": float(totals[slowest] / totals[middle]),
        }
        for which, rank in (("slowest", slowest), ("median", middle)):
            for part, value in zip(PARTS, parts[rank].tolist(), strict=True):
                found[f"Stragglers/{which}_{part}"] = value
        return found

    def _judge(
        self, parts: Tensor, slowest: int, middle: int, *, iteration: int, tell: bool
    ) -> None:
        """Count how long a rank has been slow; say it when it is time, and when it is over."""
        own, usual = float(parts[slowest].sum()), float(parts[middle].sum())
        slow = own > usual * (1 + self.percent / 100)
        warned = self._times >= self.intervals
        if warned and tell and not (slow and slowest == self._slow):
            logger.info("rank {} ({}) keeps up again", self._slow, self._names[self._slow])
        self._times = (self._times + 1 if slowest == self._slow else 1) if slow else 0
        self._slow = slowest if slow else -1
        if self._times == self.intervals and tell:
            told = ", ".join(
                f"{part} {mine:.3g} against {other:.3g}"
                for part, mine, other in zip(
                    PARTS, parts[slowest].tolist(), parts[middle].tolist(), strict=True
                )
            )
            logger.warning(
                "all ranks wait for rank {} ({}): for {} comparisons up to iteration {} it was the"
                " slowest, now with {:.3g} s of its own an iteration, {:.0f} % more than the median"
                " rank's {:.3g} s ({}); {}",
                slowest,
                self._names[slowest],
                self._times,
                iteration,
                own,
                100 * (own / usual - 1),
                usual,
                told,
                _CAUSES[int((parts[slowest] - parts[middle]).argmax())],
            )


def _of_all_ranks(figures: list[float]) -> Tensor:
    """Figures of every rank, [R, len(figures)] float64."""
    own = torch.tensor(figures, dtype=torch.float64)
    if not spread():
        return own[None]
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with naming_lost_peers():
        dist.all_gather(everyone, own)
    return torch.stack(everyone)
