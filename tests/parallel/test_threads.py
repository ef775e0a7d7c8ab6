"""Threads of torch: none of a group's is left when the interpreter is taken down."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from rcm.core.errors import PeerGone
from rcm.train import trainer
from rcm.train.checkpoint import Checkpointer
from rcm.train.metrics import JsonLines
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
    if (fork := os.fork()) == 0:  # which has none of the threads, and waits for none
        atexit._run_exitfuncs()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 7
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


def lose_a_peer_in_a_save(job: Path, moment: str) -> None:
    """A save waits for ranks that wait for this one, when it is heard that another has gone: in the
    "next iteration", and then the disk is "full" too, or "between" two parts of it.
    """
    log = Trainer._log

    def ends(run: Trainer) -> None:
        log(run)
        if run.state.iteration == 2:
            raise PeerGone("another rank ended")

    def writes(_: Checkpointer, name: str, *__: object) -> Future:
        if name != "model":
            raise PeerGone("another rank ended")
        future = Future()
        threading.Thread(target=future.result).start()
        return future

    def full(_: JsonLines) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    trainer.LOST_SAVE = 0.1
    if moment == "full":
        JsonLines.close = full
    if moment == "between":
        Checkpointer._write_later = writes
    else:
        Trainer._log, Checkpointer._finish = ends, lambda *_: threading.Event().wait()
    words = ("checkpoint.save_iter=1", "checkpoint.dcp_async_mode_enabled=True")
    launch("experiment=toy_tf_c3-3", *small(job), *words)
    os._exit(3)


@pytest.mark.dist
@pytest.mark.parametrize("moment", ["next iteration", "full", "between"])
def test_a_save_that_cannot_end_holds_nobody(moment: str, tmp_path: Path) -> None:
    """Ranks that each wait for another one's save would do so for half an hour."""
    assert run_until_death(lose_a_peer_in_a_save, tmp_path / "job", moment, timeout=60) == 1
    assert not list((tmp_path / "job").glob("running.lock"))
