"""Run a module-level function on 2 or 4 gloo ranks, each a process, and return what each rank
returned.

Children come from a fork server that has torch imported already, so a group of ranks costs a
fraction of a second instead of a few. They meet through a file and end with a barrier,
`destroy_process_group` and `os._exit(0)`: about one in twenty aborts in a destructor otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "pytest",
    "rcm.configs.cli",
    "rcm.configs.build",
    "rcm.pipelines.session",
    "rcm.pipelines.from_checkpoint",
    "tests.support.toy_method",
    "tests.support.warmed",
]
"""What cannot be imported on a machine is passed over."""
ENVIRONMENT = dict(os.environ)
"""Of all ranks: the fork server would keep for the others what the first test had set."""


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, tmp_path: Path, timeout: float = 300.0, device_type: str = "cpu"
) -> list[Any]:
    """`function(*arguments)` on `world` gloo ranks; its results (anything torch.save takes) in rank
    order. The first failing rank's traceback is raised.
    """
    folder = tmp_path / f"ranks_{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    context = _context()
    children = [context.Process(target=_child, args=(rank, world, device_type, folder, function, arguments)) for rank in range(world)]
    for child in children:
        child.start()
    deadline = time.monotonic() + timeout
    try:
        while any(child.is_alive() for child in children) and time.monotonic() < deadline:
            if any(child.exitcode not in (None, 0) for child in children):
                break
            time.sleep(0.01)
    finally:
        stuck = [child for child in children if child.is_alive()]
        for child in stuck:
            child.kill()
        for child in children:
            child.join()
    reports = [(folder / f"error_{rank}.txt") for rank in range(world)]
    for rank, report in enumerate(reports):
        if report.exists():
            raise AssertionError(f"rank {rank} of {world} failed:\n{report.read_text()}")
    missing = [rank for rank in range(world) if not (folder / f"result_{rank}.pt").exists()]
    if missing:
        codes = [child.exitcode for child in children]
        raise AssertionError(f"ranks {missing} of {world} returned nothing in {timeout} s (exit codes {codes})")
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world)]


def run_until_death(function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> int | None:
    """Exit code of a process that runs `function(*arguments)` and is expected to die in it
    (negative: the signal).
    """
    child = _context().Process(target=function, args=arguments)
    child.start()
    child.join(timeout)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    return context


def _child(rank: int, world: int, device_type: str, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    try:
        if device_type == "cuda":
            torch.cuda.set_device(rank)
        backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
        result = function(*arguments)
        partial = folder / f"partial_{rank}.pt"
        torch.save(result, partial)
        partial.rename(folder / f"result_{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error_{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _end_with_the_tests() -> None:
    """Ranks that wait for each other would otherwise outlive a run of tests that was killed, and
    keep the fork server.
    """
    multiprocessing.parent_process().join()
    os._exit(1)
