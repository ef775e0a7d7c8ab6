"""A rank is killed under torchrun with --max-restarts, or a whole machine: the job goes on from its
last checkpoint by itself, and ends bit for bit where an unbroken run ends. A job that is asked to
end saves first, though every process is asked and torchrun asks its ranks again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.faults.test_disk_and_kills import KEEPS, SAVES, TF, logged
from tests.integration.entry import everything, same, small
from tests.integration.test_resume import latest
from tests.support.processes import ROOT, begin, free_port

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
    return sorted(int(pid) for pid in told if "train" in Path(f"/proc/{pid}/cmdline").read_text())


def reach(job: Path, moment: int, *processes: subprocess.Popen) -> None:
    """Until the job has logged iteration `moment`; all processes must live meanwhile."""
    deadline = time.monotonic() + 300
    while logged(job) < moment:
        assert all(process.poll() is None for process in processes), [process.communicate()[0][-3000:] for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks through /proc")
def test_a_job_that_loses_ranks_goes_on_by_itself(tmp_path: Path) -> None:
    job, whole = tmp_path / "job", tmp_path / "whole"
    process = torchrun(job, restarts=len(KILLED_AT))
    for number, moment in enumerate(KILLED_AT):
        reach(job, moment, process)
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
def test_a_machine_that_is_lost_joins_again(tmp_path: Path) -> None:
    """Two machines of one rank, as the launch script starts them; the second one is cut off and
    comes back. torchrun as it is by itself would wait for a minute, and fail.
    """
    job, whole, script = tmp_path / "job", tmp_path / "whole", tmp_path / "machines.sh"
    script.write_text((ROOT / "examples/launch/machines.sh").read_text().replace(":29500", f":{free_port()}"))
    place = {"MACHINES": "2", "FIRST": "localhost", "GPUS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", script, TF, *small(job, iterations=ITERATIONS), SAVES, KEEPS]
    start = partial(begin, command, environment=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first = start()
    time.sleep(2)  # the machine that keeps the list is the other one
    second = start()
    reach(job, KILLED_AT[0], first, second)
    for pid in (second.pid, *ranks_of(second.pid)):
        os.kill(pid, signal.SIGKILL)
    for process in (start(), first):
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told[-3000:]
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
    reach(job, 3, process)
    for pid in (*ranks_of(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=300)
    assert told.count("SIGTERM received: stopping after this iteration") == 2, told[-3000:]
    assert latest(job) == f"iter_{logged(job):09d}", told[-3000:]
