"""A student of two times through the training command: from weights of one time, on one rank and on
two, with a checkpoint that says how to stream it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rcm.core.errors import CheckpointError
from rcm.inference.wan_models import Task
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.two_times import SPAN, initial_span
from rcm.pipelines.wan_files import config_of, network_weights
from rcm.pipelines.weight_files import open_weights
from rcm.pipelines.weight_report import inspect_weights
from tests.integration.entry import SIZES, launch, stored, weights, write_network
from tests.integration.test_ranks import alike_in_every_layout, scm

M = "model.config."


def meanflow(job: Path, start: Path, *more: str, iterations: int = 3) -> list[str]:
    return scm(job, start, *more, iterations=iterations, stage="tf_meanflow")


def test_it_trains_from_weights_of_one_time_and_says_how_it_is_used(tmp_path: Path, capfd) -> None:
    start, job = write_network(tmp_path / "start.safetensors", seed=3), tmp_path / "job"
    noisy = M + "context_from_last_step=True"
    assert launch(*meanflow(job, start, noisy, iterations=4)) == 0
    first, last = stored(start), weights(job)
    first |= initial_span(WanConfig(**SIZES, two_times=True))
    assert first.keys() == last.keys() and sum(key.startswith(SPAN) for key in last) == 4
    assert not [key for key in first if torch.equal(first[key], last[key].to(first[key].dtype))], "no gradient reached them"
    described = json.loads((job / "checkpoints/iter_000000004/rcm.json").read_text())
    assert described["network"]["two_times"] is True and described["extra"]["recipe"]["kind"] == "flow_map"
    assert described["schedule"] == [[15 / 16, 5 / 6, 5 / 8]] and described["stage"] == "tf_meanflow"
    again = tmp_path / "again"  # from weights that have the second time already
    words = [word for word in meanflow(again, start, iterations=1) if "student_ckpt" not in word]
    assert launch(*words, M + f"student_ckpt={job}") == 0
    for role in ("student", "causal_teacher"):
        assert launch(*scm(tmp_path / "one_time", start, M + f"{role}_ckpt={job}", iterations=1)) == 1
        told = capfd.readouterr().err
        assert "holds a network of two times" in told and f"(for {M}net{'_' * (role != 'student')}" in told
    assert launch(*scm(again, start, iterations=2)) == 1
    assert "two_times: True there, False here); only training_type=tf_meanflow has two times" in capfd.readouterr().err
    with pytest.raises(CheckpointError, match=r"has two times, .*; sample it with rcm stream --ckpt"):
        Task(channels=SIZES["in_dim"]).require(config_of(network_weights(open_weights(job))), str(job))
    assert f"student_ckpt={job} with training_type=tf_meanflow" in str(inspect_weights(job))


def test_a_checkpoint_that_lacks_more_is_refused_with_what_may_be_missing(tmp_path: Path, capfd) -> None:
    start = write_network(tmp_path / "start.safetensors", seed=3, ffn_dim=64)
    assert launch(*meanflow(tmp_path / "job", start, iterations=1)) != 0
    told = capfd.readouterr().err
    assert "only span_embedding.* may be missing" in told and "tensor(s) of another shape" in told


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    start = write_network(tmp_path / "start.safetensors", seed=3)
    alike_in_every_layout(tmp_path, lambda job, *more: meanflow(job, start, *more))
