"""A disk that fills up and processes that are killed, around saves: the checkpoint before stays in
use, space is given back, the rerun ends bit for bit where an unbroken run ends.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rcm.configs import cli
from rcm.train import checkpoint as saving
from rcm.train.checkpoint import Checkpointer
from tests.faults.case import Fault, count
from tests.integration.entry import everything, launch, lines, same, small
from tests.support.dist import run_until_death
from tests.support.processes import begin, free_port

TF = "experiment=toy_tf_c3-3"
SAVES = "checkpoint.save_iter=1"
KEEPS = "checkpoint.keep_last=0"
ASYNC = "checkpoint.dcp_async_mode_enabled"
HOW = ("at once", "in the background")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; skips where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this machine does not allow mounting a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def fill(folder: Path, *, but: int) -> Path:
    """A file that leaves `but` bytes free."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - but)))
    return ballast


@pytest.mark.parametrize("asynchronous", [False, True], ids=HOW)
@pytest.mark.parametrize("room", [0, *(pytest.param(room, marks=pytest.mark.slow) for room in (40_000, 150_000, 300_000))])
def test_full_disk(small_disk: Path, tmp_path: Path, request: pytest.FixtureRequest, asynchronous: bool, room: int) -> None:
    """Whatever room is left: the refusal names the disk and a path, the partial checkpoint is gone,
    and with space the rerun is exact.
    """
    count(request, "full disk", "unclear")
    job, whole = small_disk / "job", tmp_path / "whole"
    words = [SAVES, KEEPS, f"{ASYNC}={asynchronous}"]
    assert launch(TF, *small(job, iterations=1), *words) == 0
    ballast = fill(small_disk, but=room)
    there = re.escape(str(small_disk))
    refusal = rf"(?m)^error: (.*No space left on device.*{there}|cannot write to the job folder {there}/job: No space)"
    case = Fault("full", kind="full disk", refusal=refusal, main=cli.main, argv=lambda d: [TF, *small(job, iterations=4), *words])
    case.check(tmp_path)
    assert not list((job / "checkpoints").glob(".*")) and not list(job.rglob("*.writing"))
    newest = (job / "checkpoints/latest_checkpoint.txt").read_text().strip()
    assert (job / "checkpoints" / newest / "rcm.json").is_file()
    ballast.unlink()
    done = int(newest.removeprefix("iter_"))
    shutil.rmtree(small_disk / "job" / "samples", ignore_errors=True)
    assert launch(TF, *small(job, iterations=done + 1), *words) == 0
    assert launch(TF, *small(whole, iterations=done + 1)) == 0
    assert same(everything(job), everything(whole))
    count(request, "full disk")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str) -> None:
    """Replace a function by one that kills this process instead."""
    setattr(owner, name, lambda *arguments, **options: _die())


def after_parts(number: int) -> Callable[[], None]:
    """Killed once `number` parts are on their way or on disk."""

    def patch() -> None:
        for name in ("_write", "_write_later"):
            method, done = getattr(Checkpointer, name), [0]

            def dies(self: Checkpointer, *arguments: object, method=method, done=done) -> object:
                result = method(self, *arguments)
                done[0] += 1
                if done[0] == number:
                    _die()
                return result

            setattr(Checkpointer, name, dies)

    return patch


MOMENTS: dict[str, Callable[[], None]] = {
    "before the first part": lambda: before(saving, "capture"),
    "after one part": after_parts(1),
    "after two parts": after_parts(2),
    "after all parts": after_parts(4),
    "before it is published": lambda: before(Checkpointer, "_publish"),
    "before the pointer changes": lambda: before(saving, "write_atomically"),
}


SELDOM = ("after one part", "after two parts", "before it is published")
KILLS = [
    pytest.param(moment, late, id=f"{moment}, {HOW[late]}", marks=[pytest.mark.slow] * (moment in SELDOM))
    for moment in MOMENTS
    for late in (False, True)
]


def train_and_die(job: Path, moment: str, asynchronous: bool) -> None:
    """Continue a job and be killed in its next save."""
    MOMENTS[moment]()
    launch(TF, *small(job, iterations=2), SAVES, f"{ASYNC}={asynchronous}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken run."""
    job = tmp_path_factory.mktemp("whole") / "job"
    assert launch(TF, *small(job, iterations=2)) == 0
    return job


@pytest.mark.parametrize(("moment", "asynchronous"), KILLS)
def test_killed_in_a_save(tmp_path: Path, whole: Path, request: pytest.FixtureRequest, moment: str, asynchronous: bool) -> None:
    count(request, "kills inside a save", "unclear")
    job = tmp_path / "job"
    assert launch(TF, *small(job, iterations=1)) == 0
    assert run_until_death(train_and_die, job, moment, asynchronous) == -signal.SIGKILL
    assert (job / "checkpoints/latest_checkpoint.txt").read_text() == "iter_000000001\n"
    assert launch(TF, *small(job, iterations=2), SAVES) == 0
    assert same(everything(job), everything(whole)) and lines(job) == lines(whole)
    assert not list((job / "checkpoints").glob(".*"))
    count(request, "kills inside a save")


def start(job: Path, *words: str, ranks: int) -> list[subprocess.Popen]:
    """One process per rank, as a launcher starts them, each with its own pipes."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "scripts.train", TF, *small(job, iterations=100_000), SAVES, "checkpoint.keep_last=3", *words]
    places = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    return [begin(command, environment=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for place in places]


def logged(job: Path) -> int:
    metrics = job / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def reach(job: Path, target: int, processes: list[subprocess.Popen], *, seconds: float = 300) -> None:
    """Until the job has logged `target` lines; all processes must live meanwhile."""
    deadline = time.monotonic() + seconds
    while logged(job) < target:
        assert all(process.poll() is None for process in processes), [process.communicate()[1][-2000:] for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=HOW)
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_at_random(tmp_path: Path, request: pytest.FixtureRequest, ranks: int, asynchronous: bool) -> None:
    """Five kills of a job at random moments, of one rank or of all; survivors end by themselves and
    say what happened in one sentence.
    """
    count(request, "kills at random", "hang")
    job, dice = tmp_path / "job", random.Random(ranks + 10 * asynchronous)
    for _ in range(5):
        processes = start(job, f"{ASYNC}={asynchronous}", ranks=ranks)
        reach(job, logged(job) + dice.randint(3, 8), processes)
        time.sleep(dice.random() * 0.3)
        victims = processes if ranks == 1 or dice.random() < 0.4 else [dice.choice(processes)]
        for process in victims:
            process.kill()
        for process in processes:
            _, told = process.communicate(timeout=300)
            if process not in victims:
                count(request, "kills at random", "unclear")
                said = [line for line in told.splitlines() if line.startswith("error")]
                assert process.returncode == 1 and len(said) == 1 and "another rank of this launch ended" in said[0], told[-3000:]
                assert "Traceback" not in told and "gloo" not in told, told[-3000:]
    count(request, "kills at random", "unclear")
    done = int((job / "checkpoints/latest_checkpoint.txt").read_text().strip().removeprefix("iter_"))
    whole = tmp_path / "whole"
    for folder in (job, whole):
        processes = start(folder, f"trainer.max_iter={done + 2}", ranks=ranks)
        assert [process.communicate(timeout=300) and process.returncode for process in processes] == [0] * ranks
    assert same(everything(job), everything(whole))
    count(request, "kills at random")


@pytest.mark.dist
def test_a_dead_peer_is_one_sentence(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count(request, "dead peers", "hang")
    processes = start(tmp_path / "job", ranks=2)
    reach(tmp_path / "job", 3, processes)
    processes[1].kill()
    _, told = processes[0].communicate(timeout=300)
    processes[1].communicate()
    count(request, "dead peers", "unclear")
    said = [line for line in told.splitlines() if line.startswith("error")]
    assert processes[0].returncode == 1 and len(said) == 1, told[-3000:]
    assert "another rank of this launch ended" in said[0] and "gloo" not in told and "Traceback" not in told
    assert launch(TF, *small(tmp_path / "alone", iterations=1)) == 0
    count(request, "dead peers")
