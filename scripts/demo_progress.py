"""How far the demo is: bars on a terminal, a line now and then elsewhere; time left from the pace
so far.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from scripts.demo_stages import Stage, flat

PLAIN_EVERY = 20.0
"""Seconds between two lines where there is no terminal."""


class Board:
    """Shares of work done per stage (0 to 1, training and scoring together), from any thread;
    `show` draws them from one.

    `branches` as run: one after another inside a branch, branches after the first side by side.
    """

    def __init__(
        self, branches: Sequence[Sequence[Stage]], *, console: Console | None = None
    ) -> None:
        self._branches = branches
        self._stages = flat(branches)
        self._done = {stage.name: 0.0 for stage in self._stages}
        self._doing: dict[str, str] = {}
        self._begun: dict[str, tuple[float, float]] = {}
        self._start, self._resumed, self._spoken = time.monotonic(), 0.0, 0.0
        self._lock = threading.Lock()
        self.console = console or Console(file=sys.stdout, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[told]}"),
        )
        bars = Progress(*columns, console=self.console, transient=True)
        drawn = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bars = bars if drawn else None
        self._rows: dict[str, int] = {}

    def drawing(self) -> AbstractContextManager[object]:
        """Bars are on the screen inside."""
        return self._bars if self._bars is not None else nullcontext()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def number(self, name: str) -> str:
        """ "stage k of n"."""
        place = [stage.name for stage in self._stages].index(name)
        return f"stage {1 + place} of {len(self._stages)}"

    def resume(self, shares: Mapping[str, float]) -> None:
        """Work of earlier sessions, by stage; the clock of this one starts."""
        with self._lock:
            self._done |= shares
            self._start, self._resumed = time.monotonic(), self._done_path()

    def update(self, name: str, share: float, doing: str) -> None:
        """`share` of the stage is done, and what is being done."""
        with self._lock:
            now = time.monotonic()
            self._begun.setdefault(name, (now, self._done[name]))
            self._done[name] = max(self._done[name], min(1.0, share))
            self._doing[name] = doing
            if share >= 1:
                del self._doing[name]

    def left(self) -> float | None:
        """Seconds until all is done: the longest way through what is left, at this session's pace.
        None in its first seconds.
        """
        with self._lock:
            spent, worked = time.monotonic() - self._start, self._done_path() - self._resumed
            return None if worked <= 0 or spent < 5 else self._path(self._done) * spent / worked

    def show(self) -> None:
        """Draw once."""
        lines = [
            (name, f"{self.number(name)}  {name}", self._done[name], self._left_of(name))
            for name in list(self._doing)
        ]
        total = sum(sum(stage.cost) for stage in self._stages)
        lines.append(("", "all", self._cost_done() / total, self.left()))
        if self._bars is not None:
            self._draw(lines)
        elif time.monotonic() - self._spoken > PLAIN_EVERY:
            self._spoken = time.monotonic()
            self.say(
                "; ".join(
                    f"{text} {share:.0%}, {_time(left)} left" for _, text, share, left in lines
                )
            )

    def _draw(self, lines: Sequence[tuple[str, str, float, float | None]]) -> None:
        assert self._bars is not None
        shown = {name for name, *_ in lines}
        for name in set(self._rows) - shown:
            self._bars.remove_task(self._rows.pop(name))
        for name, text, share, left in lines:
            if name not in self._rows:
                self._rows[name] = self._bars.add_task(text, total=1.0, told="")
            doing = f", {told}" if (told := self._doing.get(name)) else ""
            told = f"{share:4.0%}  {_time(left)} left{doing}"
            self._bars.update(self._rows[name], completed=share, told=told)

    def _left_of(self, name: str) -> float | None:
        since, share = self._begun.get(name, (0.0, 0.0))
        gained, spent = self._done[name] - share, time.monotonic() - since
        return (1 - self._done[name]) * spent / gained if gained > 0.02 else None

    def _cost_done(self) -> float:
        return sum(self._done[stage.name] * sum(stage.cost) for stage in self._stages)

    def _path(self, done: Mapping[str, float]) -> float:
        """Cost left along the longest way, given the share done of each stage."""
        first, *others = [
            sum((1 - done.get(stage.name, 0.0)) * sum(stage.cost) for stage in one)
            for one in self._branches
        ]
        return first + max(others, default=0.0)

    def _done_path(self) -> float:
        return self._path({}) - self._path(self._done)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
