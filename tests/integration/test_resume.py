"""A run that was stopped and started again by the same command ends bit for bit where an unbroken
one ends; on several ranks too.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.entry import everything, launch, lines, same, small, write_network
from tests.support.processes import begin

M = "model.config."
SELF_FORCED = ("net", "net_bidirectional_teacher", "net_fake_score")
REGISTRY = ["--config=rcm/configs/registry_distill.py", "--"]


def self_forced(job: Path, start: Path, *more: str, iterations: int = 6) -> list[str]:
    """Both roles, EMA, a rollout, data read ahead over more than one epoch, and a schedule that has
    not ended.
    """
    return [
        "experiment=toy_sf_dmd_2step_c3-3_replayed",
        *small(job, roles=SELF_FORCED, iterations=iterations),
        M + f"student_ckpt={start}",
        M + f"bidirectional_teacher_ckpt={start}",
        M + "bidirectional_guidance=2",
        M + "student_update_freq=3",
        "scheduler.warm_up_steps=5",
        "dataloader_train.num_workers=1",
        *more,
    ]


def teacher_forced(job: Path, *more: str, iterations: int = 6) -> list[str]:
    """The smallest run, from random weights."""
    return ["experiment=toy_tf_c3-3", *small(job, iterations=iterations), *more]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return write_network(tmp_path / "start.safetensors", seed=3)


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_three_and_three_iterations_are_six(tmp_path: Path, start: Path, asynchronous: bool) -> None:
    more = [f"checkpoint.dcp_async_mode_enabled={asynchronous}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch(*self_forced(whole, start, *more)) == 0
    assert launch(*self_forced(parts, start, *more, iterations=3)) == 0
    half = everything(parts)
    assert launch(*self_forced(parts, start, *more)) == 0
    assert lines(parts) == lines(whole)
    assert [record["step"] for record in lines(parts)] == [1, 2, 3, 4, 5, 6]
    assert same(everything(parts), everything(whole))
    assert not same(half, everything(whole))
    prefixes = {key.partition(".")[0] for key in everything(whole)}
    assert {"model/net", "model/net_ema", "model/net_fake_score", "optim_net/exp_avg_sq", "optim_fake_score/exp_avg_sq"} <= prefixes


def test_a_finished_run_started_again_does_nothing(tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert launch(*teacher_forced(job, iterations=2)) == 0
    before = everything(job)
    assert launch(*teacher_forced(job, iterations=2)) == 0
    assert same(before, everything(job))
    assert len(lines(job)) == 2


def test_load_path_continues_another_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    assert launch(*teacher_forced(first, iterations=3)) == 0
    there = f"checkpoint.load_path={first}/checkpoints/iter_000000003"
    assert launch(*teacher_forced(second, there, iterations=3)) == 1
    assert "has 3 iterations, which leaves nothing to train up to trainer.max_iter=3; raise it" in capsys.readouterr().err
    assert launch(*teacher_forced(second, there)) == 0
    assert launch(*teacher_forced(whole)) == 0
    assert same(everything(second), everything(whole))
    assert [record["step"] for record in lines(second)] == [4, 5, 6]


def start_from(job: Path, source: Path, *more: str, iterations: int) -> dict:
    """What a job of other settings holds that started from another's checkpoint at 3."""
    there = f"checkpoint.load_path={source}/checkpoints/iter_000000003"
    assert launch(*teacher_forced(job, there, "trainer.seed=7", "checkpoint.load_training_state=False", *more, iterations=iterations)) == 0
    return everything(job)


def test_weights_alone_start_another_run(tmp_path: Path) -> None:
    """At rate 0 nothing but the starting weights tells the runs apart: iteration 0, own settings,
    the weights of the other run.
    """
    source, still = tmp_path / "source", ("optimizer.lr=1e-300", "optimizer.eps=1")
    assert launch(*teacher_forced(source, "optimizer.lr=0.01", iterations=3)) == 0
    there = everything(source)
    plain = start_from(tmp_path / "plain", source, *still, iterations=2)
    assert [record["step"] for record in lines(tmp_path / "plain")] == [1, 2]
    scheduled = start_from(tmp_path / "scheduled", source, *still, "checkpoint.only_load_scheduler_state=True", iterations=1)
    averaged = start_from(tmp_path / "averaged", source, *still, "checkpoint.load_ema_to_reg=True", iterations=1)
    assert (int(plain["scheduler/net.updates"]), int(scheduled["scheduler/net.updates"])) == (2, 4)
    for name in (key for key in there if key.startswith("model/net.")):
        assert plain[name].equal(there[name]) and scheduled[name].equal(there[name])
        assert averaged[name].equal(there[name.replace("model/net.", "model/net_ema.")])
    # its own newest one, whole
    assert launch(*teacher_forced(tmp_path / "plain", "trainer.seed=7", *still, iterations=3)) == 0
    assert [record["step"] for record in lines(tmp_path / "plain")] == [1, 2, 3]


def test_parts_that_are_not_resumed(tmp_path: Path) -> None:
    """A job goes on with other moments and from iteration 0: the settings of a new beginning, the
    weights of the old run.
    """
    job = tmp_path / "job"
    assert launch(*teacher_forced(job, iterations=3)) == 0
    assert launch(*teacher_forced(job, "checkpoint.keys_not_to_resume=[optim,trainer]", "trainer.seed=7", iterations=2)) == 0
    now = everything(job)
    assert int(now["scheduler/net.updates"]) == 5
    assert {int(value) for key, value in now.items() if key.startswith("optim_net/step.")} == {2}
    assert [record["step"] for record in lines(job)] == [1, 2]


def test_other_data_is_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = tmp_path / "job"
    assert launch(*teacher_forced(job, iterations=1)) == 0
    before = everything(job)
    assert launch(*teacher_forced(job, "dataloader_train.num_videos=6")) == 1
    assert "stored data position is for num_samples=5, this loader has 6" in capsys.readouterr().err
    assert same(before, everything(job))


def command(*words: str, ranks: int = 1) -> subprocess.Popen:
    """The training command as a user types it, with its output in pipes."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--master_port=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "scripts.train", *words]
    return begin(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, *, timeout: float = 300) -> str:
    """Wait; the process must succeed. Returns what it wrote to standard error."""
    _, told = process.communicate(timeout=timeout)
    assert process.returncode == 0, told
    return told


def wait_for(condition, process: subprocess.Popen, *, seconds: float = 300) -> None:
    """Until `condition()`; the process must live meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_saves_and_exits_cleanly_and_the_run_goes_on(tmp_path: Path) -> None:
    job, whole = tmp_path / "job", tmp_path / "whole"
    process = command(*teacher_forced(job, iterations=100_000))
    wait_for(lambda: (job / "metrics.jsonl").exists() and len((job / "metrics.jsonl").read_text().splitlines()) > 3, process)
    process.send_signal(signal.SIGTERM)
    told = finish(process)
    assert "SIGTERM received" in told and "interrupted after" in told
    done = json.loads((job / "checkpoints" / latest(job) / "rcm.json").read_text())["iteration"]
    assert lines(job)[-1]["step"] == done
    assert launch(*teacher_forced(job, iterations=done + 2)) == 0
    assert launch(*teacher_forced(whole, iterations=done + 2)) == 0
    assert lines(job) == lines(whole)
    assert same(everything(job), everything(whole))


def latest(job: Path) -> str:
    """Name of the newest complete checkpoint."""
    return (job / "checkpoints/latest_checkpoint.txt").read_text().strip()
