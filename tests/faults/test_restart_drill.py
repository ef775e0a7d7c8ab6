"""A rank is killed under torchrun with --max-restarts: the job goes on from its last checkpoint by
itself, and ends bit for bit where an unbroken run ends. A job that is asked to end saves first,
though every process is asked and torchrun asks its ranks again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.test_disk_and_kills import KEEPS, SAVES, TF, logged
from tests.integration.entry import everything, same, small
from tests.integration.test_resume import latest
from tests.support.processes import begin

ITERATIONS = 14
KILLED_AT = (4, 9)
"""Logged iterations at which a rank is killed, one after the other."""


def torchrun(job: Path, *more: str, restarts: int) -> subprocess.Popen:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(f"--max-restarts={restarts}", "-m", "scripts.train", TF),
        *small(job, iterations=ITERATIONS),
        *(SAVES, KEEPS, *more),
    ]
    return begin(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ranks_of(agent: int) -> list[int]:
    """Process ids of the ranks that a torchrun agent has started."""
    told = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return sorted(int(pid) for pid in told if "scripts.train" in Path(f"/proc/{pid}/cmdline").read_text())


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks through /proc")
def test_a_job_that_loses_ranks_goes_on_by_itself(tmp_path: Path) -> None:
    job, whole = tmp_path / "job", tmp_path / "whole"
    process = torchrun(job, restarts=len(KILLED_AT))
    deadline = time.monotonic() + 300
    for number, moment in enumerate(KILLED_AT):
        while logged(job) < moment:
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(ranks_of(process.pid)[number % 2], signal.SIGKILL)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told[-3000:]
    assert told.count("Signal 9 (SIGKILL)") >= len(KILLED_AT) or told.count("exitcode: -9") >= len(KILLED_AT), told[-3000:]
    assert told.count("resumed at iteration") == len(KILLED_AT), told[-3000:]
    unbroken = torchrun(whole, restarts=0)
    said, _ = unbroken.communicate(timeout=300)
    assert unbroken.returncode == 0, said[-3000:]
    assert same(everything(job), everything(whole))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks through /proc")
def test_a_job_saves_though_all_its_processes_are_signalled(tmp_path: Path) -> None:
    """As Slurm does before a job's time is over."""
    job = tmp_path / "job"
    process = torchrun(job, "trainer.max_iter=100000", "checkpoint.save_iter=100000", restarts=0)
    deadline = time.monotonic() + 300
    while logged(job) < 3:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for pid in (*ranks_of(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=300)
    assert told.count("SIGTERM received: stopping after this iteration") == 2, told[-3000:]
    assert latest(job) == f"iter_{logged(job):09d}", told[-3000:]
