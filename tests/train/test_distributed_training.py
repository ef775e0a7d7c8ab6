"""Training on 2 and 4 ranks: equal to one rank, exactly resumable, agreed stops, and checkpoints
that change the world size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rcm.core.errors import NonFinite
from rcm.nets.attention_auto import leave_out, left_out
from rcm.parallel.mesh import ParallelDims
from rcm.train.state import TrainState
from rcm.train.step import StepConfig
from tests.support.dist import run_ranks
from tests.train.run_support import everything, launch, lines, same


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return sorted(a) == sorted(b) and all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-8, atol=1e-9) for k in a)


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """Four iterations on one sequence (cp 2) and on two data streams (shard 2), the latter also in
    two halves with an asynchronous save between.
    """
    shared = launch(folder / "cp", max_iter=4, dims=ParallelDims(1, 1, 2))
    shared.run()
    found: dict[str, Any] = {"cp": everything(shared.state)}
    for gradient_sync in ("last", "each"):
        job = folder / f"whole {gradient_sync}"
        whole = launch(job, max_iter=4, dims=ParallelDims(1, 2, 1), grad_accum_iter=2, step=StepConfig(gradient_sync=gradient_sync))
        whole.run()
        found[gradient_sync] = everything(whole.state)
    options = {"dims": ParallelDims(1, 2, 1), "grad_accum_iter": 2, "asynchronous": True}
    launch(folder / "parts", max_iter=2, **options).run()
    second = launch(folder / "parts", max_iter=4, **options)
    assert second.state.iteration == 2
    second.run()
    found["resumed"] = everything(second.state)
    return found


@pytest.mark.dist
def test_two_ranks_train_like_one_and_resume_exactly(tmp_path: Path) -> None:
    single = launch(tmp_path / "one", max_iter=4)
    single.run()
    first, second = run_ranks(2, on_two_ranks, tmp_path, tmp_path=tmp_path)
    assert same(first["cp"], second["cp"]) and close(first["cp"], everything(single.state))
    for mine, theirs in zip(lines(tmp_path / "cp"), lines(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    assert same(first["resumed"], first["last"]), "resume on two ranks is not bit-identical"
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole last")
    assert close(first["each"], first["last"])
    # Both data streams count: a single rank's stream gives other weights.
    alone = launch(tmp_path / "alone", max_iter=4, grad_accum_iter=2)
    alone.run()
    assert not close(first["last"], everything(alone.state))


class AskOnRank:
    """An observer that asks the trainer to stop, on one rank only."""

    def __init__(self, rank: int, iteration: int) -> None:
        self.rank, self.iteration, self.trainer = rank, iteration, None

    def started(self, state: TrainState) -> None:
        pass

    def stepped(self, state: TrainState, *, is_main: bool) -> dict[str, float]:
        if dist.get_rank() == self.rank and state.iteration == self.iteration:
            self.trainer.request_stop()
        return {}


def agree(folder: Path) -> dict[str, Any]:
    """A NaN on rank 1 only, a stop request, a save that fails, a package of attention that does:
    every rank does the same.
    """
    dims = ParallelDims(1, 2, 1)
    broken = launch(folder / "nan", max_iter=9, dims=dims, fault=lambda i, v: v * float("nan") if i == 3 and dist.get_rank() == 1 else v)
    found: dict[str, Any] = {}
    try:
        broken.run()
    except NonFinite as error:
        found["nan"] = (str(error), broken.state.iteration)
    ask = AskOnRank(1, 4)
    stopped = launch(folder / "stop", max_iter=9, dims=dims, observers=[ask])
    ask.trainer = stopped
    leave_out({("flash3", 12, True)} if dist.get_rank() == 1 else ())
    found["stop"] = (stopped.run(), stopped.state.iteration)
    found["packages"] = left_out()
    checkpointer = stopped.checkpointer
    write = checkpointer._write

    def fails(name: str, part: dict, unfinished: Path) -> None:
        write(name, part, unfinished)
        if name == "model" and dist.get_rank() == 1:
            raise OSError(28, "No space left on device", str(unfinished / name))

    checkpointer._write = fails
    stopped.state.iteration = 6
    try:
        checkpointer.save(stopped.state, loader=stopped.loader)
    except OSError as error:
        found["disk"] = str(error)
    found["latest"] = checkpointer.latest().name
    return found


def reload(folder: Path, dims: ParallelDims, max_iter: int) -> dict[str, Any]:
    """Continue a job under other dims; its state before and after."""
    trainer = launch(folder, max_iter=max_iter, dims=dims)
    before = (trainer.state.iteration, trainer.loader.state_dict()["position"], everything(trainer.state))
    trainer.run()
    return {"before": before, "iteration": trainer.state.iteration}


@pytest.mark.dist
def test_ranks_agree_when_one_of_them_fails(tmp_path: Path) -> None:
    first, second = run_ranks(2, agree, tmp_path, tmp_path=tmp_path)
    assert first == second
    message, iteration = first["nan"]
    assert iteration == 3 and "loss of term flow" in message
    assert first["stop"] == ("interrupted", 5) and first["packages"] == {("flash3", 12, True)}
    assert "No space left" in first["disk"] and first["latest"] == "iter_000000005"


@pytest.mark.slow
@pytest.mark.dist
def test_world_size_may_change_between_save_and_load(tmp_path: Path) -> None:
    """1 rank -> 4 ranks (2 shards x cp 2) -> 2 ranks -> 1 rank: weights, averages, optimiser and
    data position arrive whole each time.
    """
    one = launch(tmp_path, max_iter=4)
    one.run()
    expected, position = everything(one.state), one.loader.state_dict()["position"]
    for report in run_ranks(4, reload, tmp_path, ParallelDims(1, 2, 2), 6, tmp_path=tmp_path):
        assert report["before"][:2] == (4, position) and same(report["before"][2], expected)
    reports = run_ranks(2, reload, tmp_path, ParallelDims(2, 1, 1), 8, tmp_path=tmp_path)
    assert [r["before"][0] for r in reports] == [6, 6] and same(reports[0]["before"][2], reports[1]["before"][2])
    assert reload(tmp_path, ParallelDims(), 9)["before"][0] == 8
    assert [record["step"] for record in lines(tmp_path)] == list(range(1, 10))
