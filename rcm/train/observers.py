"""Things that watch a run and may be removed without changing a weight: sample grids, profiler,
memory, progress line.

An observer reads the state and returns numbers to log. It draws no random number from a shared
stream and writes no weight; the EMA swap that sampling uses puts every bit back.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from loguru import logger
from torch import Tensor

from rcm.core.errors import ConfigError, first_line
from rcm.core.records import Record, within
from rcm.nets.attention import attention_record
from rcm.train.describe import write_atomically
from rcm.train.state import STUDENT, TrainState


class Observer(Protocol):
    """Called by the trainer on every rank, in the same order, outside of any gradient."""

    def started(self, state: TrainState) -> None:
        """Before the first iteration of this process."""
        ...

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """After every iteration; returns numbers to log with the next line."""
        ...


@runtime_checkable
class Ending(Protocol):
    """An observer that has something to end."""

    def finished(self) -> None:
        """Once after the last iteration of this process, however the run ended; must not raise."""
        ...


@dataclass(frozen=True)
class SamplingConfig(Record):
    """The keys of sample videos during training."""

    # iterations between sample grids of the live student; 0 = never
    every_n: int = within(0, least=0, most=10**12)
    ema_every_n: int = within(0, least=0, most=10**12)  # the same for the EMA weights; 0 = never
    num_samples: int = within(5, least=1, most=1024)  # prompts per grid
    run_at_start: bool = False  # also before the first iteration


class SampleGrid:
    """Draw samples every `every` iterations with the student's own or averaged weights and hand
    them to a writer on rank 0.

    `draw(iteration)` returns any tensor of frames and is called on every rank (a sharded network
    needs all of them); it must seed its own generator. `write(path_without_suffix, frames)` runs on
    rank 0. `weights`: "reg" or "ema".
    """

    def __init__(
        self,
        *,
        every: int,
        draw: Callable[[int], Tensor],
        write: Callable[[Path, Tensor], None],
        folder: str | Path,
        weights: str = "ema",
        at_start: bool = False,
    ) -> None:
        if every < 1 or weights not in ("reg", "ema"):
            raise ConfigError(
                f"sample grid needs every >= 1 and weights reg or ema, got every={every},"
                f" weights={weights!r}"
            )
        self.every, self.draw, self.write, self.folder, self.weights, self.at_start = (
            every,
            draw,
            write,
            Path(folder),
            weights,
            at_start,
        )

    def started(self, state: TrainState) -> None:
        """Sample the initial weights where asked."""
        if self.at_start:
            self._sample(state, is_main=is_main())

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """Sample when it is time."""
        if state.iteration % self.every == 0:
            self._sample(state, is_main=is_main)
        return {}

    @torch.no_grad()
    def _sample(self, state: TrainState, *, is_main: bool) -> None:
        ema, net = state.ema if self.weights == "ema" else None, state.roles[STUDENT].net
        with nullcontext() if ema is None else ema.swapped(net):
            frames = self.draw(state.iteration)
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write(self.folder / f"iter_{state.iteration:09d}_{self.weights}", frames)


class Memory:
    """Peak device memory in GiB since the last log, on CUDA devices."""

    def started(self, state: TrainState) -> None:
        """Forget earlier peaks."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """Current peak."""
        return (
            {"memory/peak_gib": torch.cuda.max_memory_allocated() / 2**30}
            if torch.cuda.is_available()
            else {}
        )


class KernelRecord:
    """Which kernels the trained networks ran, in the log and in the file `path`: attention back
    ends (what "auto" chose per kind of call) and the setting of the fused layers. Looked at during
    the first `watched` iterations of this process, for a role's turn may come late.
    """

    def __init__(self, path: str | Path, *, watched: int = 20) -> None:
        self.path, self._left = Path(path), watched
        self._told: dict[str, Any] = {}

    def started(self, state: TrainState) -> None:
        """Nothing ran yet."""

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """Write when something new was used."""
        if self._left == 0 or not is_main:
            return {}
        self._left -= 1
        found = {
            role: {"attention": attention_record(entry.net), "fused_layers": entry.net.fused}
            for role, entry in state.roles.items()
        }
        for role, record in found.items():
            if record != self._told.get(role):
                logger.info("kernels of {}: {}", role, record)
        if found != self._told:
            write_atomically(self.path, json.dumps(found, indent=1) + "\n")
            self._told = found
        return {}


class Profiler:
    """A trace of `active` iterations after `skip` ones of this process, or of as many as there are,
    one Chrome trace file per rank in `folder`.
    """

    def __init__(self, *, folder: str | Path, skip: int = 3, active: int = 2) -> None:
        self.folder, self.skip, self.active = Path(folder), skip, active
        self._profile: torch.profiler.profile | None = None
        self._seen = 0

    def started(self, state: TrainState) -> None:
        """Arm the profiler."""
        if self.skip == 0:
            self._begin()

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """Begin or end the trace when it is time."""
        self._seen += 1
        if self._seen == self.skip:
            self._begin()
        elif self._seen == self.skip + self.active:
            self._end()
        return {}

    def finished(self) -> None:
        """A trace that is under way is written; one of no iteration is told."""
        if self._seen > self.skip:
            try:
                self._end()
            except OSError as error:
                logger.warning("profile not written: {}", first_line(error))
        elif is_main():
            told = "no profile: trainer.profile_iter={} skips all {} iterations of this process"
            logger.warning(told, self.skip, self._seen)

    def _begin(self) -> None:
        self._profile = torch.profiler.profile()
        self._profile.__enter__()

    def _end(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        profile.export_chrome_trace(str(self.folder / f"trace_rank{rank}.json"))


class Progress:
    """Where the run is: a line that rewrites itself on a terminal, else nothing between log lines.
    Rank 0 only.
    """

    def __init__(self, *, max_iter: int, stream: Any = None) -> None:
        self.max_iter, self.stream = max_iter, stream or sys.stderr
        self._begun = (0, 0.0)

    def started(self, state: TrainState) -> None:
        """Start the clock."""
        self._begun = (state.iteration, time.monotonic())

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """Rewrite the line."""
        if not is_main or not self.stream.isatty():
            return {}
        first, since = self._begun
        pace = (time.monotonic() - since) / max(1, state.iteration - first)
        left = int(pace * (self.max_iter - state.iteration))
        filled = 30 * state.iteration // max(1, self.max_iter)
        end = "\n" if state.iteration >= self.max_iter else ""
        bar = "=" * filled + " " * (30 - filled)
        self.stream.write(
            f"\r[{bar}] {state.iteration}/{self.max_iter}  {pace:.2f} s/it "
            f" {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left{end}"
        )
        self.stream.flush()
        return {}


class LogLines:
    """A sink that logs every record: losses and pace for reading, all values at the level that goes
    into the log file.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log both lines."""
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.4g}"
            for name, value in values.items()
            if name.startswith("loss/")
        )
        pace = values.get("time/seconds_per_iteration")
        logger.info(
            "iteration {}  {}{}", step, losses, "" if pace is None else f"  {pace:.2f} s/it"
        )
        logger.debug(
            "iteration {}  {}",
            step,
            "  ".join(f"{name} {value:.4g}" for name, value in values.items()),
        )

    def close(self) -> None:
        """Nothing to release."""


def is_main() -> bool:
    """Whether this process is rank 0, or alone."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
