"""Standard output that cannot be written to: its reader has gone, its disk is full, it is closed.
One sentence, no traceback, of the interpreter's own flush neither.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rcm.inference.outcome import exit_status
from tests.faults.case import ROOT, count

PIPE, FULL = "its reader has gone", "No space left on device"


def gone() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(("output", "why"), [(gone, PIPE), (full, FULL)], ids=["reader gone", "disk full"])
@pytest.mark.parametrize("flush", [False, True])
def test_a_command_that_prints(output: Callable[[], int], why: str, flush: bool, unbuffered: bool, capsys, monkeypatch, request) -> None:
    count(request, "standard output", "unclear")
    with os.fdopen(output(), "w", buffering=1 if unbuffered else -1) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert exit_status(lambda: print("word", flush=flush)) == 2  # noqa: T201
        monkeypatch.undo()
    assert capsys.readouterr().err == f"error: cannot write to standard output: {why}\n"
    count(request, "standard output")


def test_another_full_disk_is_told_as_such(capsys, tmp_path: Path, request) -> None:
    count(request, "standard output", "unclear")

    def work() -> None:
        with open("/dev/full", "w") as file:
            file.write("x")
            file.flush()

    assert exit_status(work) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    count(request, "standard output")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["stream", "--help"]], ids=" ".join)
@pytest.mark.parametrize(("output", "status"), [(gone, 0), (full, 1), (None, 0)], ids=["reader gone", "disk full", "closed"])
def test_the_front_door(words: list[str], output: Callable[[], int] | None, status: int, request) -> None:
    if "stream" in words and output is not gone:
        pytest.skip("torch is imported once")
    count(request, "standard output", "traceback")
    stdout = None if output is None else output()
    done = subprocess.run(
        [sys.executable, "-m", "rcm", *words],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=(lambda: os.close(1)) if stdout is None else None,
    )
    if stdout is not None:
        os.close(stdout)
    said = f"error: cannot write to standard output: {FULL}\n" if output is full else ""
    assert (done.returncode, done.stderr) == (status, said)
    count(request, "standard output")
