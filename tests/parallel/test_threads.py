"""Threads of torch: none of a group's is left when the interpreter is taken down."""

from __future__ import annotations

import atexit
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rcm.core.errors import PeerGone
from rcm.train.trainer import Trainer
from tests.integration.entry import launch, small
from tests.support.dist import run_until_death
from tests.support.processes import free_port

TASKS = Path("/proc/self/task")
ENDS = {"finished": (None, 0), "one sentence": (PeerGone, 1), "unforeseen": (ValueError, None)}
"""How a run ends: kind of error, status."""


def of_gloo() -> int:
    return sum((task / "comm").read_text().startswith("pt_gloo") for task in TASKS.iterdir())


def count_threads_at_the_end(rank: int, port: int, job: Path, how: str) -> None:
    """Exit with gloo's threads after a rank's run, and after what an interpreter does last."""
    problem, status = ENDS[how]
    log = Trainer._log

    def ends(trainer: Trainer) -> None:
        log(trainer)
        if problem is not None:
            raise problem("ends here")

    Trainer._log = ends
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        assert launch("experiment=toy_tf_c3-3", *small(job, iterations=1)) == status
    except ValueError as error:  # as the interpreter keeps what it has printed
        sys.last_value, sys.last_traceback = error, error.__traceback__
    before = of_gloo()
    atexit._run_exitfuncs()
    os._exit(10 * before + of_gloo())


@pytest.mark.dist
@pytest.mark.skipif(not TASKS.is_dir(), reason="sees threads through /proc")
@pytest.mark.parametrize("how", ENDS)
def test_no_thread_of_a_group_outlives_a_run(how: str, tmp_path: Path) -> None:
    """One that still held a collective's tensors then would abort the process. Caches of DTensor's
    keep two groups of two threads.
    """
    port = free_port()
    with ThreadPoolExecutor() as pool:
        ended = [pool.submit(run_until_death, count_threads_at_the_end, rank, port, tmp_path / "job", how) for rank in range(2)]
    assert [rank.result() for rank in ended] == [40, 40]
