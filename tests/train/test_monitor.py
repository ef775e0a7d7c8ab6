"""The heartbeat says what the run does, a stall is noticed once and with its place; figures are
those of the process and of all ranks.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loguru import logger

from rcm.train import monitor
from rcm.train.monitor import DeviceMonitor, HeartBeat, resident_bytes
from tests.integration import entry
from tests.support.dist import run_ranks
from tests.train.run_support import launch, lines


@pytest.fixture
def told():
    """Lines of the log."""
    found: list[str] = []
    sink = logger.add(lambda line: found.append(str(line)), level="INFO", format="{level} {message}")
    yield found
    logger.remove(sink)


def at(iteration: int) -> SimpleNamespace:
    return SimpleNamespace(iteration=iteration)


def test_beats_are_written_and_lines_said_when_it_is_time(tmp_path: Path, told: list[str]) -> None:
    """Against a clock that moves 90 s per iteration: a beat every 4 iterations, a line every 20
    minutes.
    """
    now = [0.0]
    beat = HeartBeat(tmp_path / "heartbeat.json", every=4, minutes=20, clock=lambda: now[0])
    beat.started(at(10))
    read = lambda: json.loads((tmp_path / "heartbeat.json").read_text())  # noqa: E731
    assert (read()["state"], read()["iteration"], read()["seconds_per_iteration"]) == ("training", 10, None)
    for iteration in range(11, 41):
        now[0] += 90
        beat.stepped(at(iteration), is_main=True)
        assert read()["iteration"] == (max(10, iteration - iteration % 4))
    assert read()["seconds_per_iteration"] == 90 and read()["process"] == os.getpid()
    assert [line.strip() for line in told] == [f"INFO heartbeat: at work on iteration {n}" for n in (25, 39)]
    beat.finished()
    assert read()["state"] == "ended" and read()["iteration"] == 40


def test_a_stall_is_told_once_with_its_place(tmp_path: Path, told: list[str]) -> None:
    path, now = tmp_path / "heartbeat.json", [0.0]
    beat = HeartBeat(path, every=100, minutes=0.002, clock=lambda: now[0])

    def stand_still() -> None:
        now[0] += 1
        while json.loads(path.read_text())["state"] != "stalled":
            time.sleep(0.01)
        time.sleep(0.3)  # ten looks of the watch

    beat.started(at(3))
    stand_still()
    beat.stepped(at(4), is_main=True)
    record = json.loads(path.read_text())
    beat.finished()
    stalls = [line for line in told if "no iteration has ended" in line]
    assert len(stalls) == 1 and "the last was 3; the main thread is in test_monitor.py:" in stalls[0] and "stand_still" in stalls[0]
    assert sum("iterations go on: number 4" in line for line in told) == 1
    assert (record["state"], record["iteration"]) == ("training", 4)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_run_ends_its_watch(tmp_path: Path, ends: str) -> None:
    def fail(iteration: int, v: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    beat = HeartBeat(tmp_path / "heartbeat.json", every=1)
    trainer = launch(tmp_path, max_iter=2, observers=[beat], fault=fail if ends == "badly" else None)
    if ends == "badly":
        with pytest.raises(RuntimeError, match="broken"):
            trainer.run()
    else:
        trainer.run()
    record = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (record["state"], record["iteration"]) == ("ended", 0 if ends == "badly" else 2)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_a_beat_that_cannot_be_written_ends_neither_run_nor_watch(tmp_path: Path, told: list[str]) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    beat = HeartBeat(folder / "heartbeat.json", every=1)
    beat.started(at(0))
    (folder / "heartbeat.json").unlink()
    folder.rmdir()
    beat.stepped(at(1), is_main=True)
    beat.finished()
    assert sum("heartbeat not written" in line for line in told) == 2


def test_a_stall_that_is_over_is_not_written_any_more(tmp_path: Path) -> None:
    """The two threads may come to the file in any order."""
    beat = HeartBeat(tmp_path / "heartbeat.json", every=1)
    beat.started(at(3))
    beat._stalled = True
    beat.stepped(at(4), is_main=True)
    beat._write_if_possible("stalled")
    assert json.loads((tmp_path / "heartbeat.json").read_text())["state"] == "training"
    beat.finished()


def test_figures_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Highest, lowest, mean; a figure that some ranks lack counts where it is, so that every rank
    logs the same names.
    """
    given = [{"cpu_mem_gb": 2.0}, {"cpu_mem_gb": 6.0, "temp": 80.0}, {"cpu_mem_gb": 4.0, "temp": 60.0}]
    seen: list[dict[str, float]] = []
    watcher = DeviceMonitor(every=5, device=torch.device("cpu"), gather=lambda own: seen.append(own) or given)
    watcher.started(at(0))
    assert watcher.stepped(at(4), is_main=True) == {} and not seen
    assert watcher.stepped(at(5), is_main=False) == {
        "DeviceMonitor/max_cpu_mem_gb": 6.0,
        "DeviceMonitor/min_cpu_mem_gb": 2.0,
        "DeviceMonitor/avg_cpu_mem_gb": 4.0,
        "DeviceMonitor/max_temp": 80.0,
        "DeviceMonitor/min_temp": 60.0,
        "DeviceMonitor/avg_temp": 70.0,
    }
    assert seen[0].keys() == {"cpu_mem_gb"} and 0.05 < seen[0]["cpu_mem_gb"] < 64


def test_resident_memory_grows_with_what_is_touched() -> None:
    before, size = resident_bytes(), 64 << 20
    # pages of its own: an allocator may hand out some that the process has touched before
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        assert 0.9 * size < resident_bytes() - before < 2 * size


def test_figures_of_a_card(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """With stand-ins for torch's questions: units, and a question without an answer is left out and
    asked once.
    """
    asked: list[str] = []

    def silent(device: torch.device) -> float:
        asked.append("power")
        raise ValueError("Not Supported")

    gib = 2**30
    for name, value in (("max_memory_allocated", 3 * gib), ("max_memory_reserved", 5 * gib)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    stats = {"active_bytes.all.current": gib, "inactive_split_bytes.all.current": gib // 2, "num_alloc_retries": 7}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    answers = {"util": (lambda d: 97, 1), "temp": (lambda d: 61, 1), "power": (silent, 1000), "gpu_mem_used_gb": (lambda d: 8 * gib, gib)}
    monkeypatch.setattr(monitor, "NVML", answers | {"clock": (lambda d: 1980, 1)})
    watcher = DeviceMonitor(every=1, device=torch.device("cuda", 0), gather=lambda own: [own])
    watcher.started(at(0))
    found = {name.removeprefix("DeviceMonitor/max_"): v for name, v in watcher.stepped(at(1), is_main=True).items() if "/max_" in name}
    assert found.pop("cpu_mem_gb") > 0
    assert found == {
        "peak_gpu_mem_gb": 3,
        "peak_gpu_mem_reserved_gb": 5,
        "gpu_mem_active_gb": 1,
        "gpu_mem_inactive_split_gb": 0.5,
        "alloc_retries": 7,
        "util": 97,
        "temp": 61,
        "gpu_mem_used_gb": 8,
        "clock": 1980,
    }
    assert asked == ["power"] and sum("power left out, NVML does not tell (ValueError: Not Supported)" in line for line in told) == 1


def two_ranks() -> None:
    """Each rank has figures of its own; both return the same."""
    rank = torch.distributed.get_rank()
    watcher = DeviceMonitor(every=1, device=torch.device("cpu"))
    watcher._figures = lambda: {"cpu_mem_gb": 1.0 + rank, **({"temp": 50.0} if rank else {})}
    found = watcher.stepped(at(1), is_main=rank == 0)
    assert found["DeviceMonitor/max_cpu_mem_gb"] == 2 and found["DeviceMonitor/avg_cpu_mem_gb"] == 1.5
    assert found["DeviceMonitor/min_temp"] == 50


def test_ranks_log_the_same_names(tmp_path: Path) -> None:
    run_ranks(2, two_ranks, tmp_path=tmp_path)


def test_callbacks_of_the_command_line(tmp_path: Path) -> None:
    """A run of the training command leaves a heartbeat that says how it ended, and figures beside
    its losses.
    """
    job = tmp_path / "job"
    assert entry.launch("experiment=toy_tf_c3-3", *entry.small(job, iterations=3), "callbacks=[basic]", "trainer.logging_iter=1") == 0
    record = json.loads((job / "heartbeat.json").read_text())
    assert (record["state"], record["iteration"]) == ("ended", 3)
    assert all("DeviceMonitor/max_cpu_mem_gb" in line for line in entry.lines(job))


def test_figures_reach_the_log_of_a_run(tmp_path: Path) -> None:
    launch(tmp_path, max_iter=4, observers=[DeviceMonitor(every=2, device=torch.device("cpu"))]).run()
    assert ["DeviceMonitor/avg_cpu_mem_gb" in line for line in lines(tmp_path)] == [False, True, False, True]
