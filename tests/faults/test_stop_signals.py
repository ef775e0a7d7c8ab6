"""SIGTERM and Ctrl-C: one word, the status that shells have, no half file; whoever answers the
signal is left to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rcm.core.output_file import OutputFile
from rcm.front import cli
from rcm.inference.outcome import exit_status
from rcm.pipelines.video_io import Mp4Writer
from tests.faults.case import count
from tests.hygiene.source import ROOT

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def stop(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)  # the handler breaks it off


@pytest.fixture(autouse=True)
def usual_handlers():
    before = {number: signal.getsignal(number) for number in STATUS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "what was there is there again"
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STATUS)
def test_a_command_is_stopped(number: signal.Signals, tmp_path: Path, capsys, request) -> None:
    count(request, "signals", "unclear")
    target = OutputFile.claim(tmp_path / "a.json")

    def work() -> None:
        with target.replacing() as partial:
            partial.write_text("half")
            stop(number)

    assert exit_status(work) == STATUS[number]
    assert capsys.readouterr().err == "stopped\n" and not os.listdir(tmp_path)
    count(request, "signals")


@pytest.mark.parametrize("number", STATUS)
def test_a_video_keeps_what_there_was(number: signal.Signals, tmp_path: Path, capsys, request) -> None:
    count(request, "signals", "unclear")

    def work() -> None:
        with Mp4Writer(tmp_path / "a.mp4", fps=8) as writer:
            writer.append(torch.zeros(3, 4, 16, 16))
            stop(number)

    assert exit_status(work) == STATUS[number]
    assert os.listdir(tmp_path) == ["a.partial.mp4"]
    count(request, "signals")


@pytest.mark.parametrize("number", STATUS)
def test_the_front_door(number: signal.Signals, monkeypatch, capsys, request) -> None:
    count(request, "signals", "unclear")
    monkeypatch.setattr(cli, "overview", lambda: stop(number))
    assert cli.main(["--help"]) == STATUS[number]
    assert capsys.readouterr().err == "stopped\n"
    count(request, "signals")


@pytest.mark.parametrize("module", ["rcm.inference.stream", "scripts.train", "rcm.kernels.flash_jvp.selfcheck", "mine"])
def test_a_module_that_is_still_importing(module: str, tmp_path: Path, request) -> None:
    """It comes while torch is read. What runs a program of somebody else's is left as it was."""
    count(request, "signals", "unclear")
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    (tmp_path / "mine.py").write_text("import rcm.inference.stream\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-m", module], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGINT and (ended.stderr == "stopped\n") == (module != "mine")
    count(request, "signals")


def test_a_handler_of_others_stays(request) -> None:
    count(request, "signals", "unclear")
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    assert exit_status(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0 and seen == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    count(request, "signals")
