"""The loop: data, step, log, observe, save, stop. It receives built objects and owns none of the
mathematics.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from loguru import logger

from rcm.core.dual import guard_tangents
from rcm.core.errors import ConfigError, NonFinite, first_line
from rcm.core.records import Record, within
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.methods.base import Method
from rcm.nets.attention_auto import leave_out, left_out
from rcm.parallel.agree import is_lost_peer, together, union
from rcm.parallel.mesh import ParallelDims
from rcm.train.checkpoint import Checkpointer
from rcm.train.garbage import lasting_objects
from rcm.train.metrics import Averages, Sink
from rcm.train.monitor import CallbacksConfig
from rcm.train.observers import Ending, Observer, SamplingConfig
from rcm.train.offload import IdleRoles, OffloadConfig
from rcm.train.snapshot import Positioned
from rcm.train.state import TrainState
from rcm.train.step import StepConfig, StepReport, run_step
from rcm.train.stragglers import OwnTime

Outcome = Literal["finished", "interrupted"]
SETTLING = 20
"""Iterations of a process after which ranks agree on packages of attention that one of them cannot
call: a role's turn may come late."""


LOST_SAVE = 10.0
"""Seconds for a save in the background to end by itself after another rank has gone."""
RELAYED = 5.0
"""Seconds after a SIGTERM in which another one is the same: a scheduler signals all processes of a
job, and torchrun hands on to its ranks what it gets.
"""


class Loader(Positioned, Protocol):
    """An endless stream of this data rank's batches with an exact position."""

    def __iter__(self) -> Iterator[LatentBatch]: ...


@dataclass(frozen=True)
class TrainerConfig(Record):
    """The loop. An iteration is one optimiser step of any role: student and fake-score updates both
    count.
    """

    max_iter: int = within(100_000, least=1, most=10**12)  # iterations of either kind
    grad_accum_iter: int = within(1, least=1, most=2**16)  # micro-batches per iteration
    logging_iter: int = within(50, least=1, most=10**12)  # iterations between log lines
    # key of every random draw, with (step, data rank, purpose); 32 bits
    seed: int = within(0, least=0, most=2**32 - 1)
    # skip_sample leaves out a sample whose tangent or target is not finite, and counts it
    nan_policy: Literal["stop", "skip_sample"] = "stop"
    # skip_sample: largest share of skipped samples before the run stops anyway
    nan_sample_limit: float = 0.01
    # each: reduce after every term (14B: no unsharded gradients, more traffic)
    gradient_sync: Literal["last", "each"] = "last"
    # GiB of weights of the largest student that stays gathered through a rollout; 0 = none
    keep_gathered_gib: float = within(4.0, least=0.0, most=1e6)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    # GPU: two runs equal bit for bit, in longer gradient passes (docs/checkpoints.md#resume)
    deterministic: bool = False
    guard_tangents: bool = True  # check on the first step that no module drops a tangent
    progress_bar: bool = True  # on rank 0
    # iterations of this process before two that the profiler records; 0 = no profile
    profile_iter: int = within(0, least=0, most=10**12)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.nan_sample_limit <= 1:
            raise ConfigError(f"nan_sample_limit={self.nan_sample_limit} must be a share in [0, 1]")

    @property
    def skipped_limit(self) -> float:
        """Largest share of samples that losses may zero as not finite between two log lines."""
        return self.nan_sample_limit if self.nan_policy == "skip_sample" else 1.0


class Trainer:
    """Runs a method until `config.max_iter`, from wherever `state` is.

    `state`: built by TrainState.create and, on resume, loaded by `checkpointer.load(state,
    loader=loader)` before `run`. `dims`: of the launch. `checkpointer` None: nothing is saved,
    else every `save_iter` iterations. `step`: how gradients are treated.
    `sinks`: where numbers go, used on rank 0. `observers`: see observers.py. `idle`: networks that
    wait in host memory while it is not their turn.
    """

    def __init__(
        self,
        method: Method,
        loader: Loader,
        *,
        state: TrainState,
        dims: ParallelDims,
        config: TrainerConfig,
        step: StepConfig = StepConfig(),
        save_iter: int = 500,
        device: torch.device | str = "cpu",
        checkpointer: Checkpointer | None = None,
        sinks: Sequence[Sink] = (),
        observers: Sequence[Observer] = (),
        own: OwnTime | None = None,
        idle: IdleRoles | None = None,
    ) -> None:
        self.method, self.loader, self.state, self.dims = method, loader, state, dims
        self.config, self.step, self.save_iter, self.idle = config, step, save_iter, idle
        self.device, self.checkpointer = torch.device(device), checkpointer
        self.observers, self.own = tuple(observers), own or OwnTime()
        self.is_main = dims.rank == 0
        self.sinks = tuple(sinks) if self.is_main else ()
        self._averages = Averages()
        self._batch_size = 1
        self._stop = threading.Event()

    def request_stop(self) -> None:
        """Finish the running iteration on every rank, save, and return from `run`. Safe to call
        from a signal handler or another thread.
        """
        self._stop.set()

    def run(self) -> Outcome:
        """Train until max_iter ("finished") or until any rank is asked to stop ("interrupted");
        save before returning.

        SIGTERM and SIGINT ask to stop; a second one takes its usual effect. Raises what a step
        raises, and on every rank what reading data, observing or logging raises on one, without
        saving: the last checkpoint stays in use.
        """
        state, config = self.state, self.config
        with self._signals(), self._closing(), lasting_objects() as pass_over:
            together(lambda: self._observe(lambda observer: observer.started(state)))
            batches = iter(self.loader)
            begun = saved = state.iteration
            clock, stop, first = time.monotonic(), False, True
            while state.iteration < config.max_iter and not stop:
                report = self._iterate(batches, guard=first and config.guard_tangents)
                if first:  # optimiser states, compiled kernels
                    pass_over()
                first, stop = False, report.stop
                if state.iteration <= begun + SETTLING:
                    leave_out(union(left_out()))
                self._averages.add(report.logs)
                self._averages.add({"time/seconds_per_iteration": time.monotonic() - clock})
                together(
                    lambda: self._observe(
                        lambda observer: self._averages.add(
                            observer.stepped(state, is_main=self.is_main)
                        )
                    )
                )
                clock = time.monotonic()
                if (
                    state.iteration % config.logging_iter == 0
                    or state.iteration == config.max_iter
                    or stop
                ):
                    self._log()
                if (
                    state.iteration % self.save_iter == 0
                    and state.iteration < config.max_iter
                    and not stop
                ):
                    saved = self._save()
            if saved != state.iteration:
                self._save()
            if self.checkpointer is not None:
                self.checkpointer.wait()
        logger.info(
            "{} after {} of {} iterations",
            "interrupted" if stop else "finished",
            state.iteration,
            config.max_iter,
        )
        return "interrupted" if stop and state.iteration < config.max_iter else "finished"

    def _iterate(self, batches: Iterator[LatentBatch], *, guard: bool) -> StepReport:
        config = self.config
        begun = time.monotonic()
        data = together(lambda: self._read(batches))
        self._averages.add({"time/seconds_waiting_for_data": time.monotonic() - begun})
        self._batch_size = data[0].batch_size
        rngs = [
            StepRng(config.seed, self.state.iteration, self.dims.data_rank, micro, self.device)
            for micro in range(config.grad_accum_iter)
        ]
        with ExitStack() as guards:
            if guard:
                for net in self.method.trainable.values():
                    guards.enter_context(guard_tangents(net))
            return run_step(
                self.state,
                self.method,
                batches=data,
                rngs=rngs,
                dims=self.dims,
                config=self.step,
                idle=self.idle,
                stop=self._stop.is_set(),
            )

    def _read(self, batches: Iterator[LatentBatch]) -> list[LatentBatch]:
        with self.own.counted("data"):
            return [self._next(batches) for _ in range(self.config.grad_accum_iter)]

    def _next(self, batches: Iterator[LatentBatch]) -> LatentBatch:
        try:
            return next(batches).to(self.device)
        except StopIteration:
            raise RuntimeError(
                f"the data ended at iteration {self.state.iteration}; a training loader starts over"
                " instead of ending"
            ) from None

    def _log(self) -> None:
        values = self._averages.collect(device=self.device, world_size=self.dims.world_size)
        together(lambda: self._tell(values))
        self._judge_skipped(values)

    def _tell(self, values: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.state.iteration, values)

    def _judge_skipped(self, values: Mapping[str, float]) -> None:
        """Raise NonFinite on every rank when losses zeroed more samples since the last log line
        than `skipped_limit` allows.
        """
        for name, count in values.items():
            share = count / self._batch_size
            if name.endswith("/nonfinite_samples") and share > self.config.skipped_limit:
                raise NonFinite(
                    f"{name}: {share:.1%} of the samples up to iteration {self.state.iteration}"
                    " were not finite and skipped, more than"
                    f" trainer.nan_sample_limit={self.config.skipped_limit:g}; the last checkpoint"
                    " stays in use"
                )

    def _save(self) -> int:
        if self.checkpointer is not None:
            self.checkpointer.save(self.state, loader=self.loader)
        return self.state.iteration

    def _observe(self, call: Callable[[Observer], object]) -> None:
        """Every observer is called whatever one of them raises, for others of them are collective;
        the first problem is raised afterwards, others beside it are logged.
        """
        problems = []
        with torch.no_grad():
            for observer in self.observers:
                try:
                    call(observer)
                except Exception as error:
                    problems.append(error)
        for other in problems[1:]:
            logger.error("another observer failed, too: {}", first_line(other))
        if problems:
            raise problems[0]

    @contextmanager
    def _closing(self) -> Iterator[None]:
        with ExitStack() as ends:  # each comes, whatever another one raises
            ends.push(self._settle)
            for sink in self.sinks:
                ends.push(_ending(sink.close))
            for observer in self.observers:
                if isinstance(observer, Ending):
                    ends.push(_ending(observer.finished))
            yield

    def _settle(self, kind: object, error: BaseException | None, trace: object) -> None:
        """A save's collectives must not outlive the process group, whatever ended the run. Where a
        rank has gone they may wait for one that waits here: for so long, and no longer.
        """
        if self.checkpointer is not None:
            lost = error is not None and is_lost_peer(error)
            self.checkpointer.settle(seconds=LOST_SAVE if lost else None)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While training, the first SIGTERM or SIGINT asks to stop, a second one takes its usual
        effect. A SIGTERM that follows at once is the first one, relayed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {
            number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
        }

        asked: dict[int, float] = {}

        def ask(number: int, _frame: object) -> None:
            now = time.monotonic()
            if number not in asked:
                asked[number] = now
                name = signal.Signals(number).name
                logger.warning(
                    "{} received: stopping after this iteration; again to stop at once", name
                )
                self.request_stop()
            elif number == signal.SIGINT or now - asked[number] > RELAYED:
                signal.signal(number, before[number])
                signal.raise_signal(number)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ending(action: Callable[[], None]) -> Callable[..., None]:
    """`action` as the end of a context. What ended the run stays what is raised, for others judge
    by it whether a rank has gone; a failure of `action` beside it is logged.
    """

    def ended(_kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            action()
        except Exception as other:  # whatever a sink or observer raises, none is swallowed
            if error is None:
                raise
            logger.error("another failure as the run ended: {}", first_line(other))

    return ended
