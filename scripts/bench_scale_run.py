"""A run built as training builds it, with random weights, a few iterations of the trainer's own
loop, and what was seen of them: a row of `scripts.bench_scale`, a case of `scripts.bench_memory`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rcm.configs.build import allow_tf32, step_config, train_state
from rcm.configs.build_data import build_loader, negative_condition
from rcm.configs.build_method import build_method
from rcm.configs.build_nets import NetBuilder
from rcm.configs.compose import Run
from rcm.configs.memory import require_here
from rcm.configs.schema_causal import CausalConfig
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.inference.outcome import out_of_memory
from rcm.methods.adversary import HEAD
from rcm.methods.base import Method, Phase, Thunk
from rcm.parallel.fsdp import local
from rcm.parallel.mesh import ParallelDims
from rcm.train.memory_trace import MemoryTrace
from rcm.train.offload import IdleRoles
from rcm.train.state import TrainState
from rcm.train.trainer import Outcome, Trainer
from scripts.bench_measure import fill, forget

WARM = 100_000
"""Iteration that held phases claim: behind every warm-up of a loss."""

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_MARKS = ("nccl:", "FSDP::", "Optimizer.", "ProfilerStep")
"""How the profiler's own marks on a GPU's time line begin; kernels of NCCL are called
ncclDevKernel...
"""


@dataclass
class Iteration:
    """One iteration as a rank saw it: role, index of the role's update, seconds, peak bytes
    allocated and reserved, how often the allocator had to give back memory first, milliseconds
    of kernels (empty where not profiled), and bytes allocated before it.
    """

    role: str
    index: int
    seconds: float
    allocated: float
    reserved: float
    retries: int
    kernels: dict[str, float] = field(default_factory=dict)
    before: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """How a row ended on this rank: "measured", "out of memory", "stopped" or "failed", why, and
    its iterations without those that warmed up.
    """

    status: str
    why: str = ""
    iterations: tuple[Iteration, ...] = ()


class RandomNets(NetBuilder):
    """Builds networks as training does, and fills them with random numbers on the device."""

    def _fill(self, net: nn.Module, knob: str, roles: tuple[str, ...], start: object) -> None:
        fill(net)


class Scripted:
    """A method whose phases are given in advance."""

    def __init__(self, method: Method, phases: Sequence[Phase]) -> None:
        self.method, self.phases, self.name = method, phases, method.name

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """The method's."""
        return self.method.trainable

    def phase(self, iteration: int) -> Phase:
        """The given one."""
        return self.phases[iteration]

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """The method's."""
        return self.method.terms(phase, batch, rng)


class Endless:
    """A few batches in turn, made before the clock runs."""

    def __init__(self, batches: Sequence[LatentBatch]) -> None:
        self._batches = itertools.cycle(batches)

    def __iter__(self) -> Iterator[LatentBatch]:
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """Has no position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has no position."""


class Meter:
    """Peak of allocated bytes: CUDA's own counter, or a trace of tensors on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.trace = None if device.type == "cuda" else MemoryTrace()

    def watching(self) -> AbstractContextManager[object]:
        """Counts within."""
        return nullcontext() if self.trace is None else self.trace.watching()

    def start(self) -> float:
        """Begin a new maximum; returns what is allocated now."""
        if self.trace is not None:
            self.trace.reset_peak()
            return self.trace.current
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> float:
        """The maximum since `start`, all work done."""
        if self.trace is not None:
            return self.trace.peak
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


class Watch:
    """An observer of the trainer that measures every iteration, its data and update included; those
    of `profiled` with the profiler on.
    """

    def __init__(
        self, phases: Sequence[Phase], *, meter: Meter, profiled: frozenset[int] = frozenset()
    ) -> None:
        self.phases, self.meter, self.profiled = phases, meter, profiled
        self.iterations: list[Iteration] = []
        self.idle: IdleRoles | None = None
        self._retries = 0
        self._profile: profile | None = None

    def started(self, state: TrainState) -> None:
        """Begin."""
        self._begin(state.iteration)

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        """Read the clock and the memory, and begin again."""
        peak = self.meter.peak()  # waits for the device
        seconds = time.perf_counter() - self._since
        done = self.phases[state.iteration - 1]
        if self.meter.trace is not None:  # a CPU's host memory is counted with the rest
            peak -= host_memory(state, self.idle)
        reserved, retries = peak, 0
        if self.meter.trace is None:
            reserved = torch.cuda.max_memory_reserved(self.meter.device)
            retries = torch.cuda.memory_stats(self.meter.device)["num_alloc_retries"]
        seen = (seconds, peak, reserved, retries - self._retries, self._kernels())
        self.iterations.append(Iteration(done.role, done.index, *seen, before=self._before))
        self._retries = retries
        self._begin(state.iteration)
        return {}

    def _begin(self, iteration: int) -> None:
        if iteration in self.profiled:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()
        self._before = self.meter.start()
        self._since = time.perf_counter()

    def end(self) -> None:
        """Leave a profiler that an error left running; the next one could not begin."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile = None

    def _kernels(self) -> dict[str, float]:
        if self._profile is None:
            return {}
        ended = self._profile
        self.end()
        events = ended.profiler.kineto_results.events()
        spans = [
            (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in events
            if event.device_type() == torch.autograd.DeviceType.CUDA
            and not event.name().startswith(_MARKS)
        ]
        return kernel_times(spans)


def host_memory(state: TrainState, idle: IdleRoles | None) -> float:
    """Bytes that wait on the host."""
    kept = [
        value
        for role in state.roles.values()
        if getattr(role.optimizer, "host", False)
        for values in role.optimizer.state.values()
        for key, value in values.items()
        if key != "step"
    ]
    if state.ema is not None and state.ema.host:
        kept += state.ema.shadow.values()
    return sum(local(value).nbytes for value in kept) + (0 if idle is None else idle.bytes)


def kernel_times(spans: Sequence[tuple[str, int, int]]) -> dict[str, float]:
    """Milliseconds of GPU time from (name, begin, end) in nanoseconds, on any stream: `nccl_ms`
    during which a kernel of NCCL ran, `exposed_ms` those of them in which nothing else did,
    `busy_ms` in which anything did, and by kind of collective the sums of their kernels. Kernels of
    NCCL also wait for other ranks.
    """
    kinds: dict[str, float] = {}
    for name, begin, end in spans:
        if name.startswith("nccl"):
            kind = f"{name.removeprefix('ncclDevKernel_').partition('_')[0].partition('(')[0]}_ms"
            kinds[kind] = kinds.get(kind, 0.0) + (end - begin) / 1e6
    nccl = _union((begin, end) for name, begin, end in spans if name.startswith("nccl"))
    other = _union((begin, end) for name, begin, end in spans if not name.startswith("nccl"))
    busy = _length(_union([*nccl, *other]))
    return {"nccl_ms": _length(nccl), "exposed_ms": busy - _length(other), "busy_ms": busy, **kinds}


def _union(intervals: Any) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def _length(intervals: Sequence[tuple[int, int]]) -> float:
    return sum(end - begin for begin, end in intervals) / 1e6


def longest_rollout(run: Run) -> int:
    """Index of the update with the most rollout steps."""
    model = run.config.model.config
    if isinstance(model, CausalConfig):
        return model.step_schedule().steps(0) - 1
    return model.max_simulation_steps_fake - 1


def middle_indices(run: Run, repeats: int) -> list[int]:
    """Update indices whose rollouts are, on the mean of an even number of `repeats`, as long as
    those of a whole cycle of step counts.
    """
    return [(longest_rollout(run) + turn % 2) // 2 for turn in range(repeats)]


def scripted_phases(run: Run, roles: Sequence[str], indices: Sequence[int]) -> list[Phase]:
    """Each role in turn at its update of each of `indices`."""
    model = run.config.model.config
    causal = isinstance(model, CausalConfig)
    rollout = causal and model.has.self_forced
    beside = {"fake_score": (HEAD,)} if causal and model.gan.loss_scale else {}
    return [
        Phase(role, index, WARM + number, beside=beside.get(role, ()), rollout=rollout)
        for number, index in enumerate(indices)
        for role in roles
    ]


def attempt(
    run: Run,
    *,
    dims: ParallelDims,
    device: torch.device,
    roles: Sequence[str],
    warm: int = 1,
    repeats: int = 2,
    profiled: bool = True,
    reduce: str = "",
) -> Attempt:
    """Measure a run; what goes wrong is told, not raised, and nothing stays on the device.
    Collective.

    Iterations count behind the first `warm` of their role (kernels, optimiser states, the
    allocator's habits). One more of every role is profiled, which takes the host time.
    """
    indices, traced = middle_indices(run, repeats), profiled and device.type == "cuda"
    phases = scripted_phases(run, roles, [indices[0]] * warm + indices + indices[:traced])
    last = frozenset(range(len(phases) - traced * len(roles), len(phases)))
    watch = Watch(phases, meter=Meter(device), profiled=last)
    try:
        outcome = trained(run, watch, dims=dims, device=device, reduce=reduce)
        whole = Attempt("measured", iterations=tuple(watch.iterations[warm * len(roles) :]))
        found = whole if outcome == "finished" else Attempt("stopped", "asked to stop")
    except Exception as error:  # a row that fails must not take the others with it
        status = "out of memory" if out_of_memory(error) else "failed"
        found = Attempt(
            status, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        )
    watch.end()
    del watch
    forget(device)
    return found


def trained(
    run: Run, watch: Watch, *, dims: ParallelDims, device: torch.device, reduce: str = ""
) -> Outcome:
    """What `rcm.configs.build` does for `scripts.train`, without files, through the phases of
    `watch`.
    """
    with watch.meter.watching():
        return _train(run, watch, dims=dims, device=device, reduce=reduce)


def _train(
    run: Run, watch: Watch, *, dims: ParallelDims, device: torch.device, reduce: str
) -> Outcome:
    config = run.config
    allow_tf32()
    require_here(config, device=device)
    watch.idle = idle = IdleRoles() if config.trainer.offload.idle_roles else None
    nets = RandomNets(
        config.model.config,
        dims=dims,
        device=device,
        seed=config.trainer.seed,
        idle=idle,
        host=config.trainer.offload.parameters,
    )
    if reduce:
        nets.precision = replace(nets.precision, reduce=_DTYPES[reduce])
    method = build_method(config, nets, negative=lambda: negative_condition(config, device=device))
    loader = iter(build_loader(config, dims=dims))
    count = len(watch.phases)
    settings = replace(config.trainer, max_iter=count, logging_iter=count, guard_tangents=False)
    return Trainer(
        Scripted(method, watch.phases),
        Endless([next(loader).to(device) for _ in range(2)]),
        state=train_state(config, method),
        dims=dims,
        config=settings,
        step=step_config(config),
        device=device,
        observers=[watch],
        idle=idle,
    ).run()
