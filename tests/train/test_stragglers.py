"""The slowest rank is found by its own time, in every part of an iteration, and only by that."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loguru import logger

from rcm.parallel.mesh import ParallelDims
from rcm.train.checkpoint import Checkpointer
from rcm.train.monitor import CallbacksConfig
from rcm.train.stragglers import OwnTime, SpeedProbe, Stragglers, own_seconds
from rcm.train.trainer import Trainer
from tests.integration import entry
from tests.support.dist import run_ranks
from tests.train.run_support import launch, lines


@pytest.fixture
def told():
    text = io.StringIO()
    number = logger.add(text, format="{level} {message}")
    yield text
    logger.remove(number)


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


PARTS = {  # seconds of an iteration; data, checkpoint and probe of each rank -> data, compute, checkpoint of each rank
    "equal ranks": (row(10, 10), row(0, 0), row(0, 0), row(1, 1), [[0, 10, 0], [0, 10, 0]]),
    "a card at half the speed": (row(10, 10, 10), row(0, 0, 0), row(0, 0, 0), row(1, 2, 1), [[0, 5, 0], [0, 10, 0], [0, 5, 0]]),
    "slow files": (row(10, 10), row(1, 4), row(0, 0), row(3, 3), [[1, 6, 0], [4, 6, 0]]),
    "all of it": (row(10, 10), row(1, 0), row(0, 1), row(1, 4), [[1, 2, 0], [0, 8, 1]]),
    "seconds of one rank are off": (row(10, 10, 90), row(0, 0, 0), row(0, 0, 0), row(1, 1, 1), [[0, 10, 0]] * 3),
    "more than an iteration": (row(10, 10), row(11, 0), row(0, 0), row(1, 1), [[11, 0, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("name", PARTS)
def test_own_time_is_what_no_other_rank_is_waited_for_in(name: str) -> None:
    *given, expected = PARTS[name]
    assert own_seconds(*given).tolist() == expected


def at(iteration: int) -> SimpleNamespace:
    return SimpleNamespace(iteration=iteration)


def test_it_is_said_once_in_a_row_of_comparisons_and_when_it_is_over(told: io.StringIO) -> None:
    """Rank 1 reads for 0, 3, 0, 3, 3, 3, 3, 0 of 10 s: the third comparison in a row names it."""
    now, waits = [0.0], iter([0, 3, 0, 3, 3, 3, 3, 0])

    def gather(figures: list[float]) -> torch.Tensor:
        assert figures[0] == 10.0
        return row(10, 0, 0, 1, 10, next(waits), 0, 1).view(2, 4)

    watch = Stragglers(
        OwnTime(), every=2, device=torch.device("cpu"), percent=20, intervals=3, probe=lambda: 1.0, gather=gather, clock=lambda: now[0]
    )
    watch.started(at(0))
    watch._names = ["here", "hostb cuda:1"]
    said = []
    for iteration in range(1, 17):
        now[0] += 10
        found = watch.stepped(at(iteration), is_main=True)
        assert bool(found) == (iteration % 2 == 0)
        said.append(told.getvalue())
        told.truncate(0)
    assert [bool(words) for words in said] == [iteration in (12, 16) for iteration in range(1, 17)]
    assert re.search(
        r"WARNING all ranks wait for rank 1 \(hostb cuda:1\): for 3 comparisons up to iteration 12 it was the slowest, now with 10 s of"
        r" its own an iteration, 43 % more than the median rank's 7 s \(data 3 against 0, compute 7 against 7, checkpoint 0 against 0\);"
        r" its files answer slowly \(dataloader_train.num_workers",
        said[11],
    )
    assert "INFO rank 1 (hostb cuda:1) keeps up again" in said[15]


def test_saving_counts_as_its_mean_since_the_start() -> None:
    """A save of 8 s in the second of four iterations, none later: 4, then 2 s an iteration."""
    figures: list[list[float]] = []

    def gather(mine: list[float]) -> torch.Tensor:
        figures.append(mine)
        return row(*mine).view(1, 4)

    now, own = [0.0], OwnTime(clock=lambda: now[0])
    watch = Stragglers(own, every=2, device=torch.device("cpu"), probe=lambda: 1.0, gather=gather, clock=lambda: now[0])
    watch.started(at(0))
    for iteration in range(1, 5):
        now[0] += 2
        if iteration == 2:
            with own.counted("checkpoint"):
                now[0] += 8
        watch.stepped(at(iteration), is_main=True)
    assert figures == [[6.0, 0.0, 4.0, 1.0], [2.0, 0.0, 2.0, 1.0]]


def test_settings() -> None:
    with pytest.raises(ValueError, match=r"stragglers.percent=5.0 has no effect while its every_n=0"):
        CallbacksConfig(stragglers=CallbacksConfig().stragglers.__class__(percent=5.0))


def test_the_probe_times_products() -> None:
    probe = SpeedProbe(torch.device("cpu"))
    small = probe()
    probe._size *= 4
    assert 0 < small < probe()


class Slowed:
    """Wraps what rank `rank` does, so that it takes `seconds` longer."""

    def __init__(self, owner: type, name: str, *, rank: int, seconds: float) -> None:
        self.owner, self.name, self.before = owner, name, getattr(owner, name)
        before = self.before

        def slow(*arguments, **more):
            if dist.get_rank() == rank:
                time.sleep(seconds)
            return before(*arguments, **more)

        setattr(owner, name, slow)


def slow_rank(job: Path, part: str) -> str:
    """On a rank of a group: a run whose last rank is slow in one part; what rank 0 said."""
    last = dist.get_world_size() - 1
    text = io.StringIO()
    logger.add(text, format="{level} {message}")
    owner, name, seconds = {
        "data": (Trainer, "_next", 0.3),
        "compute": (SpeedProbe, "_settle", 0.02),
        "checkpoint": (dcp.FileSystemWriter, "write_data", 0.2),
    }[part]
    Slowed(owner, name, rank=last, seconds=seconds)
    dims = ParallelDims(dp_shard=dist.get_world_size())
    own = OwnTime()
    probe = None if part == "compute" else lambda: 1.0
    watch = Stragglers(own, every=2, device=torch.device("cpu"), percent=10, intervals=2, probe=probe)
    trainer = launch(job, max_iter=6, dims=dims, observers=[watch], save_iter=2 if part == "checkpoint" else 100)
    trainer.own = trainer.checkpointer.own = own
    trainer.run()
    return text.getvalue()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("part", "world"),
    [("data", 2), pytest.param("compute", 4, marks=pytest.mark.slow), pytest.param("checkpoint", 2, marks=pytest.mark.slow)],
)
def test_a_slow_rank_is_named_with_its_part(tmp_path: Path, part: str, world: int) -> None:
    job = tmp_path / "job"
    first, *others = run_ranks(world, slow_rank, job, part, tmp_path=tmp_path)
    assert f"all ranks wait for rank {world - 1} (" in first
    causes = {"data": "its files answer", "compute": "its card or processor", "checkpoint": "its disk"}
    assert [cause in first for cause in causes.values()] == [name == part for name in causes]
    assert not any("all ranks wait" in words for words in others)
    compared = [line for line in lines(job) if "Stragglers/slowest_rank" in line]
    assert [line["step"] for line in compared] == [2, 4, 6]
    assert [line["Stragglers/slowest_rank"] for line in compared[1:]] == [world - 1] * 2
    for line in compared[1:]:
        assert line[f"Stragglers/slowest_{part}"] > 1.3 * line[f"Stragglers/median_{part}"]


def test_a_run_of_one_rank_says_where_its_time_goes(tmp_path: Path) -> None:
    words = ["trainer.callbacks.stragglers.every_n=1", "trainer.logging_iter=1"]
    assert entry.launch("experiment=toy_tf_c3-3", *entry.small(tmp_path / "job", iterations=2), *words) == 0
    for line in entry.lines(tmp_path / "job"):
        assert line["Stragglers/slowest_over_median"] == 1 and line["Stragglers/slowest_compute"] > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saving_counts_as_own_time(tmp_path: Path, asynchronous: bool) -> None:
    trainer = launch(tmp_path, max_iter=1, asynchronous=asynchronous)
    trainer.run()
    assert isinstance(trainer.checkpointer, Checkpointer)
    assert 0 < trainer.checkpointer.own.take()["checkpoint"] < 60
    assert json.loads((tmp_path / "checkpoints/iter_000000001/rcm.json").read_text())["iteration"] == 1
