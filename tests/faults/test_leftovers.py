"""Leftovers and locks in a job's folder: what stands in the way of a save is removed, another run
is not, nothing outside is touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from rcm.configs import cli
from rcm.train.job_lock import NAME, job_lock
from tests.faults.case import Fault, count, each
from tests.integration.entry import everything, small
from tests.support.dist import run_until_death

TF = "experiment=toy_tf_c3-3"
NAMES = (
    "checkpoints/.writing_iter_000000001",
    "checkpoints/.writing_iter_000000007",
    "checkpoints/.replaced_iter_000000001",
    "checkpoints/iter_000000001",
    "checkpoints/latest_checkpoint.txt.writing",
    ".config.yaml",
    ".config.yaml.writing",
    NAME,
)
PRECIOUS = "do not touch"


def as_file(path: Path) -> None:
    path.write_bytes(b"\xff\x00 left by something else")


def as_folder(path: Path) -> None:
    (path / "below").mkdir(parents=True)
    (path / "below" / "file").write_text("x")


def as_link(path: Path) -> None:
    job = next(parent for parent in path.parents if parent.name == "job")
    path.symlink_to(job.parent / "outside")


def as_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


TYPES: dict[str, Callable[[Path], None]] = {
    "file": as_file,
    "folder": as_folder,
    "link to a folder outside": as_link,
    "dangling link": as_dangling_link,
    "pipe": as_pipe,
}


def train(folder: Path) -> list[str]:
    """One iteration in `folder`/job, saved."""
    return [TF, *small(folder / "job", iterations=1)]


def leftover(name: str, kind: str) -> Fault:
    """A job whose folder has something under `name`."""

    def argv(folder: Path) -> list[str]:
        (folder / "outside").mkdir()
        (folder / "outside" / "file").write_text(PRECIOUS)
        path = folder / "job" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        TYPES[kind](path)
        return train(folder)

    def saved(folder: Path) -> None:
        assert everything(folder / "job") and not list((folder / "job").rglob("*.writing"))
        assert sorted(path.name for path in (folder / "job/checkpoints").iterdir()) == ["iter_000000001", "latest_checkpoint.txt"]
        assert (folder / "outside" / "file").read_text() == PRECIOUS

    return Fault(f"{name} is a {kind}", kind="leftovers", refusal=None, main=cli.main, argv=argv, after=saved)


COMMON, RARE = ("file", "folder", "link to a folder outside"), ("dangling link", "pipe")


@each([leftover(n, t) for n in NAMES for t in COMMON] + [leftover(n, t) for n in (NAMES[0], NAMES[-1]) for t in RARE])
def test_leftovers_stop_no_save(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


def lock_says(text: bytes) -> Fault:
    """A lock file that nobody holds."""

    def argv(folder: Path) -> list[str]:
        (folder / "job").mkdir()
        (folder / "job" / NAME).write_bytes(text)
        return train(folder)

    def gone(folder: Path) -> None:
        assert not (folder / "job" / NAME).exists() and everything(folder / "job")

    # every worker must give a case the same name
    told = repr(text.replace(str(os.getpid()).encode(), b"own")[:30])
    return Fault(f"left lock {told}", kind="locks", refusal=None, main=cli.main, argv=argv, after=gone)


def holder(**changes: object) -> bytes:
    told = {"host": socket.gethostname(), "pid": os.getpid(), "started": "2026-01-01T00:00:00+00:00", "birth": 1, **changes}
    return json.dumps(told).encode()


STALE = [
    holder(),
    holder(pid=2**22 + 1),
    holder(pid="x"),
    holder(host="elsewhere"),
    b"\xff\xfe",
    b"null",
    b"{",
    b"9" * 100_000,
    b"[" * 10_000,
]


@each([lock_says(text) for text in STALE])
def test_a_lock_that_nobody_holds_is_taken_over(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


def test_a_second_run_is_refused_by_name(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count(request, "locks")
    (tmp_path / "job").mkdir()
    who = rf"process {os.getpid()} on host {socket.gethostname()}, started 20\d\d-"
    words = rf"the job folder {tmp_path}/job is in use by {who}.*another job.name"
    case = Fault("held", kind="locks", refusal=words, main=cli.main, argv=lambda folder: train(tmp_path))
    with job_lock(tmp_path / "job"):
        case.check(tmp_path / "case")
        assert (tmp_path / "job" / NAME).is_file() and not (tmp_path / "job/config.yaml").exists()
    Fault("released", kind="locks", refusal=None, main=cli.main, argv=lambda folder: train(tmp_path)).check(tmp_path / "case")


def hold_and_die(folder: Path) -> None:
    with job_lock(folder):
        os.kill(os.getpid(), 9)


def test_a_killed_holder_keeps_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count(request, "locks")
    (tmp_path / "job").mkdir()
    assert run_until_death(hold_and_die, tmp_path / "job") == -9
    assert json.loads((tmp_path / "job" / NAME).read_text())["pid"] != os.getpid()
    Fault("killed", kind="locks", refusal=None, main=cli.main, argv=lambda folder: train(tmp_path)).check(tmp_path / "case")


def test_a_child_that_outlives_its_run_keeps_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The system's lock is still held, by a process of the dead run; the file names a process that
    is gone.
    """
    count(request, "locks")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / NAME).write_bytes(holder(pid=2**22 + 1))
    with open(tmp_path / "job" / NAME) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Fault("orphan", kind="locks", refusal=None, main=cli.main, argv=lambda folder: train(tmp_path)).check(tmp_path / "case")
