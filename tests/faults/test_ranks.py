"""What one of two ranks finds alone: it says so, the other ends at once with one sentence, nobody
waits, and nothing is half done.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rcm.configs import cli
from rcm.core.errors import ConfigError
from rcm.data.fake import FakeLatents
from rcm.data.tar_index import ShardError
from rcm.train.checkpoint import Checkpointer
from rcm.train.job_lock import job_lock
from rcm.train.metrics import JsonLines
from rcm.train.observers import KernelRecord
from tests.faults.case import Broken, count
from tests.integration.entry import small
from tests.support.dist import run_ranks

TF = "experiment=toy_tf_c3-3"
ASYNC = "checkpoint.dcp_async_mode_enabled=True"


def raising(error: Exception, *, after: int = 0, also: bool = False) -> Callable[[Any], Callable]:
    """Replaces a method by one that raises from its call number `after` on; `also`: once it has
    done what it does, collectives included.
    """

    def around(method: Callable) -> Callable:
        calls = [0]

        def called(self: Any, *arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                if also:
                    method(self, *arguments, **options)
                raise error
            return method(self, *arguments, **options)

        return called

    return around


def failing_later(method: Callable) -> Callable:
    """A write in the background that finds no space."""

    def called(self: Any, *arguments: Any) -> Future:
        method(self, *arguments).result()
        failed: Future = Future()
        failed.set_exception(OSError(28, "No space left on device", "/disk/part"))
        return failed

    return called


@dataclass(frozen=True)
class Split:
    """A launch on two ranks. `words`: of each; `patch`: (rank, class, method, replacement). `told`:
    what each rank's line must match, "" for a rank that may be silent. `published`: checkpoints
    that must be there afterwards.
    """

    name: str
    told: tuple[str, str]
    words: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    patch: tuple[int, type, str, Callable] | None = None
    held: bool = False
    published: tuple[str, ...] = ()
    code: int = 1
    kind: str = field(default="rank disagreements")


def both(*words: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return words, words


FULL = OSError(28, "No space left on device", "/disk/file")
SAVES = "checkpoint.save_iter=1"
LR = "optimizer.lr="
CONTEXT = "model_parallel.context_parallel_size=3"

CASES = [
    Split("rates", told=(r"ranks differ in .*optimizer.lr: 0.01 on rank 0, 0.02 on rank 1", ""), words=((LR + "0.01",), (LR + "0.02",))),
    Split("seeds", told=(r"trainer.seed: 0 on rank 0, 5 on rank 1", ""), words=((), ("trainer.seed=5",))),
    Split("names of jobs", told=(r"job.name: 'a' on rank 0, 'b' on rank 1", ""), words=(("job.name=a",), ("job.name=b",))),
    Split(
        "a refusal on rank 1",
        told=(r"rank 0: stopped because of rank 1: unknown key 'x'", r"error on rank 1: unknown key 'x'"),
        words=((), ("+x=1",)),
        code=2,
    ),
    Split(
        "a refusal on rank 0",
        told=(r"error on rank 0: unknown key 'x'", r"rank 1: stopped because of rank 0: unknown key 'x'"),
        words=(("+x=1",), ()),
        code=2,
    ),
    Split("two refusals", told=(r"rank 0: unknown key 'x'", r"rank 1: unknown key 'y'"), words=(("+x=1",), ("+y=1",)), code=2),
    Split("one refusal of both", told=(r"^error: unknown key 'x'", "^$"), words=both("+x=1"), code=2),
    Split("a mesh that does not fit", told=(r"^error: .*context_parallel_size", "^$"), words=both(CONTEXT), code=2),
    Split(
        "data",
        told=(r"ranks differ in their data \(fingerprint: 'fake-.*' on rank 0, 'other' on rank 1\)", ""),
        patch=(1, FakeLatents, "fingerprint", lambda method: lambda self: "other"),
    ),
    Split(
        "a damaged shard on rank 1",
        told=(r"rank 0: stopped because of rank 1: shard s.tar: member 3 is damaged", r"rank 1: shard s.tar: member 3 is damaged"),
        patch=(1, FakeLatents, "fetch", raising(ShardError("shard s.tar: member 3 is damaged"), after=2)),
        words=both(SAVES),
        published=("iter_000000002",),
    ),
    Split(
        "an unreadable disk on rank 0",
        told=(r"rank 0: .*Input/output error", r"rank 1: stopped because of rank 0: .*Input/output error"),
        patch=(0, FakeLatents, "fetch", raising(OSError(5, "Input/output error", "s.tar"))),
    ),
    Split(
        "no memory for data on rank 1",
        told=(r"rank 0: stopped because of rank 1: MemoryError", r"^$"),
        patch=(1, FakeLatents, "fetch", raising(MemoryError("out of memory"))),
        code=-1,
    ),
    Split(
        "a full disk under a save of rank 1",
        told=(r"rank 0: .*No space left.*previous checkpoint", r"rank 1: .*No space left.*previous checkpoint"),
        patch=(1, Checkpointer, "_write", raising(FULL, after=5, also=True)),
        words=both(SAVES),
        published=("iter_000000001",),
    ),
    Split(
        "a full disk under a background save of rank 1",
        told=(r"rank 0: .*No space left.*previous checkpoint", r"rank 1: .*No space left.*previous checkpoint"),
        patch=(1, Checkpointer, "_write_later", failing_later),
        words=both(SAVES, ASYNC),
    ),
    Split(
        "a full disk when a save is published",
        told=(r"rank 0: .*No space left", r"rank 1: stopped because of rank 0: .*No space left"),
        patch=(0, Checkpointer, "_publish", raising(FULL, after=1)),
        words=both(SAVES),
        published=("iter_000000001",),
    ),
    Split(
        "a full disk under the log",
        told=(r"rank 0: .*No space left", r"rank 1: stopped because of rank 0: .*No space left"),
        patch=(0, JsonLines, "write", raising(FULL, after=1)),
    ),
    Split(
        "an observer that cannot write",
        told=(r"rank 0: .*No space left", r"rank 1: stopped because of rank 0: .*No space left"),
        patch=(0, KernelRecord, "stepped", raising(FULL)),
    ),
    Split(
        "an observer that refuses to start",
        told=(r"rank 0: stopped because of rank 1: no", r"rank 1: no"),
        patch=(1, KernelRecord, "started", raising(ConfigError("no"))),
    ),
    Split("a folder in use", told=(r"rank 0: .* is in use by process \d+", r"rank 1: stopped because of rank 0: the job"), held=True),
]


def on_rank(case_name: str, job: Path) -> tuple[int, str, float]:
    """Exit code (-1: another exception), lines of standard error that begin with "error", and
    seconds, of this rank's launch.
    """
    case, rank = next(case for case in CASES if case.name == case_name), dist.get_rank()
    os.environ.update(WORLD_SIZE="2", RANK=str(rank))
    if case.patch is not None and case.patch[0] == rank:
        _, kind, name, replacement = case.patch
        setattr(kind, name, replacement(getattr(kind, name)))
    told, begin = io.StringIO(), time.monotonic()
    with contextlib.ExitStack() as around:
        if case.held and rank == 0:
            job.mkdir()
            around.enter_context(job_lock(job))
        around.enter_context(contextlib.redirect_stderr(told))
        try:
            code = cli.main([TF, *small(job), *case.words[rank]])
        except Exception:
            code = -1
    lines = [line for line in told.getvalue().splitlines() if line.startswith("error")]
    return code, "\n".join(lines), time.monotonic() - begin


SELDOM = ("a full disk under a background save of rank 1", "an observer that refuses to start", "no memory for data on rank 1")


@pytest.mark.dist
@pytest.mark.parametrize("name", [pytest.param(case.name, marks=[pytest.mark.slow] * (case.name in SELDOM)) for case in CASES])
def test_two_ranks_end_together(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    case = next(case for case in CASES if case.name == name)
    count(request, case.kind, "hang")
    found = run_ranks(2, on_rank, name, tmp_path / "job", tmp_path=tmp_path)
    count(request, case.kind, "exit 0")
    codes = [code for code, _, _ in found]
    assert all(codes) and case.code in codes, found
    count(request, case.kind, "unclear")
    for words, (_, told, _) in zip(case.told, found, strict=True):
        if "\n" in told or "gloo" in told or not re.search(words, told):
            raise Broken("unclear", f"expected {words!r}, got {told!r}")
    folder = tmp_path / "job" / "checkpoints"
    left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    assert [name for name in left if name != "latest_checkpoint.txt"] == list(case.published)
    assert not list(tmp_path.glob("job/running.lock")) and not list(tmp_path.glob("job/*.writing"))
    count(request, case.kind)
