"""Compiling kernels before they are needed, side by side in threads: one by one they take seconds
of a first frame.

While `precompile` runs a plan, a launch made with `launch` starts the compilation of its kernel and
runs nothing. So code that computes on tensors of the meta device tells which kernels it will want,
before any weight is loaded. Triton compiles outside of Python's lock, and the last step in a
process of its own: threads are enough.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rcm.core.process_wide import ProcessWide

if TYPE_CHECKING:  # Triton is absent on machines without a GPU
    from triton.compiler import CompiledKernel

MOST_THREADS = 32
SWITCH_SECONDS = 2e-4
_planned: ContextVar[torch.device | None] = ContextVar("planned", default=None)


@dataclass(frozen=True)
class Compiled:
    """Distinct kernels of a plan, and the seconds until they were loaded on the device (from
    Triton's cache on disk, where it has them). `planned`: seconds until all were known; `parts`:
    per kernel its name and the seconds at which its compilation began, was done, and it was loaded.
    """

    kernels: int = 0
    seconds: float = 0.0
    planned: float = 0.0
    parts: tuple[tuple[str, float, float, float], ...] = ()


class Kernel(Protocol):
    """What `triton.jit` makes of a function, as far as launches are concerned."""

    def __getitem__(self, grid: tuple[int, ...], /) -> Callable[..., object]:
        """The function that launches it over `grid`."""

    def warmup(self, *arguments: object, grid: tuple[int, ...], **constants: object) -> object:
        """Compile what such a launch would run."""


def launch(kernel: Kernel, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """`kernel[grid](*arguments, **constants)`; in a plan of `precompile`, only the compilation of
    what that would run.
    """
    if _planned.get() is None:
        kernel[grid](*arguments, **constants)
    else:
        kernel.warmup(*arguments, grid=grid, **constants)


def device_for(x: Tensor) -> torch.device:
    """Where `x` computes: on its device, or for a tensor on meta in a plan of `precompile`, on the
    one compiled for.
    """
    planned = _planned.get()
    return planned if planned is not None and x.is_meta else x.device


def precompile(
    plan: Callable[[], object], *, device: torch.device | str, threads: int | None = None
) -> Compiled:
    """Compile the kernels that `plan` launches (by `launch`, in this thread) for a CUDA `device`,
    load them there, and wait.

    `threads`: how many at once, by default the cores of this process, at most MOST_THREADS. The
    first error of a compilation is raised. May run in a thread of its own, beside the loading of
    weights.
    """
    return copy_context().run(_precompile, plan, _indexed(device), threads or default_threads())


def default_threads() -> int:
    """Cores that this process may use, at most MOST_THREADS."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _indexed(device: torch.device | str) -> torch.device:
    """With the index that it stands for."""
    device = torch.device(device)
    return (
        device
        if device.index is not None
        else torch.device(device.type, torch.cuda.current_device())
    )


def _precompile(plan: Callable[[], object], device: torch.device, threads: int) -> Compiled:
    import triton  # absent on machines without a GPU

    start = time.perf_counter()
    _planned.set(device)
    pool = ThreadPoolExecutor(
        threads, thread_name_prefix="compile", initializer=torch.cuda.set_device, initargs=(device,)
    )
    loading = _Loading(pool, start)
    with QUICK_TURNS, torch.cuda.device(device), pool, triton.AsyncCompileMode(loading):
        _prepare(pool)
        plan()
        planned = time.perf_counter() - start
    return Compiled(loading.submitted, time.perf_counter() - start, planned, tuple(loading.parts))


def _prepare(pool: ThreadPoolExecutor) -> None:
    """What Triton does once in a process before it compiles: hash its own library of 400 MB for the
    keys of its cache, let a C compiler build its driver (with an empty cache), and import what
    tells the types of arguments. Side by side here; a launch does one after the other.
    """
    from triton.runtime.cache import triton_key
    from triton.runtime.driver import driver

    begun = (pool.submit(triton_key), pool.submit(lambda: driver.active))
    import_module("triton.experimental.gluon")
    for step in begun:
        step.result()


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Compilations leave Python's lock dozens of times each; whoever wants it back waits a whole
    interval for another thread's Python code.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


QUICK_TURNS = ProcessWide(_quick_turns)
"""The same while any thread has a plan."""


class _Loading:
    """What Triton hands its compilations to: threads of `pool` compile a kernel, then build its
    launcher and load it, which the first launch would do otherwise.
    """

    def __init__(self, pool: ThreadPoolExecutor, start: float) -> None:
        self.submitted, self.start, self._pool = 0, start, pool
        self.parts: list[tuple[str, float, float, float]] = []
        # kernels of one function share launchers: the first to be ready builds, the others find it
        self._building: defaultdict[object, threading.Lock] = defaultdict(threading.Lock)

    def submit(self, compile_kernel: Callable[[], CompiledKernel], /) -> Future[CompiledKernel]:
        """Compile and load."""
        self.submitted += 1
        return self._pool.submit(self._compile_and_load, compile_kernel)

    def _compile_and_load(self, compile_kernel: Callable[[], CompiledKernel]) -> CompiledKernel:
        times = [time.perf_counter() - self.start]
        kernel = compile_kernel()
        times.append(time.perf_counter() - self.start)
        with self._building[kernel.src.fn.fn]:
            _ = kernel.run  # a property, which loads
        self.parts.append(
            (kernel.src.fn.fn.__name__, times[0], times[1], time.perf_counter() - self.start)
        )
        return kernel
