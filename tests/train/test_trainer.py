"""The loop on one rank: golden losses, exact resume, stopping, observers that may be removed, the
tangent guard of the first step.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rcm.core.dual import jvp
from rcm.core.errors import ConfigError, NonFinite, TangentLost
from rcm.nets.condition import Condition
from rcm.parallel.threads import HELD
from rcm.train.observers import Memory, Profiler, Progress, SampleGrid
from rcm.train.state import TrainState
from rcm.train.trainer import Trainer, TrainerConfig
from tests.support.toy_method import LAYOUT
from tests.train.run_support import everything, launch, lines, same

GOLDEN = Path(__file__).parent / "golden_losses.json"


class At:
    """An observer that calls a function after one iteration."""

    def __init__(self, iteration: int, call) -> None:
        self.iteration, self.call = iteration, call

    def started(self, state: TrainState) -> None:
        pass

    def stepped(self, state: TrainState, *, is_main: bool) -> Mapping[str, float]:
        if state.iteration == self.iteration:
            self.call()
        return {}


def test_twenty_steps_match_the_golden_losses(tmp_path: Path) -> None:
    """A change of any number here is a change of the training mathematics. To record anew:
    RCM_RECORD_GOLDEN=1.
    """
    assert launch(tmp_path, max_iter=20).run() == "finished"
    found = lines(tmp_path)
    if os.environ.get("RCM_RECORD_GOLDEN"):
        GOLDEN.write_text("[\n" + ",\n".join(json.dumps(record, sort_keys=True) for record in found) + "\n]\n")
    expected = json.loads(GOLDEN.read_text())
    assert [sorted(r) for r in found] == [sorted(r) for r in expected] and len(found) == 20
    for record, golden in zip(found, expected, strict=True):
        assert record == pytest.approx(golden, rel=1e-8), f"step {golden['step']}"


@pytest.mark.parametrize(("prefetch", "asynchronous"), [pytest.param(0, False, marks=pytest.mark.slow), (2, True)])
def test_resume_is_bit_identical(tmp_path: Path, prefetch: int, asynchronous: bool) -> None:
    """Twenty iterations at once, and ten, a new process's worth of objects, and ten more: equal
    weights, averages, optimisers and log.
    """
    whole = launch(tmp_path / "whole", max_iter=20, grad_accum_iter=2, precision="fp32")
    whole.run()
    options = {"grad_accum_iter": 2, "prefetch": prefetch, "asynchronous": asynchronous, "precision": "fp32"}
    launch(tmp_path / "parts", max_iter=10, **options).run()
    second = launch(tmp_path / "parts", max_iter=20, **options)
    assert second.state.iteration == 10
    second.run()
    assert same(everything(whole.state), everything(second.state))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_resume_repeats_no_logged_step(tmp_path: Path) -> None:
    """Killed at 13 after saving at 10: steps 11 to 13 are run and logged again, once."""
    broken = launch(tmp_path, max_iter=20, save_iter=5, fault=lambda i, v: v * float("nan") if i == 13 else v)
    with pytest.raises(NonFinite):
        broken.run()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "torn')
    again = launch(tmp_path, max_iter=15)
    assert again.state.iteration == 10
    again.run()
    assert [record["step"] for record in lines(tmp_path)] == list(range(1, 16))


def test_a_run_that_fails_leaves_no_save_half_done(tmp_path: Path) -> None:
    """The asynchronous save of iteration 4 is finished, and its thread gone, when the NaN of the
    next iteration reaches the caller.
    """
    broken = launch(tmp_path, max_iter=9, save_iter=4, asynchronous=True, fault=lambda i, v: v * float("nan") if i == 4 else v)
    with pytest.raises(NonFinite):
        broken.run()
    assert not [thread for thread in threading.enumerate() if thread.name == HELD]
    assert broken.checkpointer.latest().name == "iter_000000004"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_returns(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    trainer = launch(tmp_path, max_iter=50, observers=[At(4, lambda: os.kill(os.getpid(), number))])
    assert trainer.run() == "interrupted"
    assert trainer.state.iteration == 5, "the running iteration is finished, one more carries the request to all ranks"
    assert signal.getsignal(number) is before
    assert launch(tmp_path, max_iter=50).state.iteration == 5


def test_a_relayed_signal_is_no_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler signals every process of a job, and torchrun its ranks: the run still saves. One
    that comes later takes its usual effect.
    """
    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    try:
        for window, taken in ((60.0, []), (0.0, [signal.SIGTERM])):
            monkeypatch.setattr("rcm.train.trainer.RELAYED", window)
            twice = lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]  # noqa: E731
            trainer = launch(tmp_path / str(window), max_iter=50, observers=[At(1, twice)])
            assert trainer.run() == "interrupted" and stopped == taken
            assert launch(tmp_path / str(window), max_iter=50).state.iteration == trainer.state.iteration > 0
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_observers_may_be_removed(tmp_path: Path) -> None:
    """With samples from averaged and own weights, a profiler, memory and a progress line the
    weights are the same, bit for bit.
    """
    plain = launch(tmp_path / "plain", max_iter=6)
    plain.run()
    drawn: list[Tensor] = []
    watched = launch(tmp_path / "watched", max_iter=6)
    net = watched.method.nets["student"]

    def draw(iteration: int) -> Tensor:
        torch.rand(3)  # a shared stream, which training must not depend on
        x = torch.ones(1, 4, LAYOUT.num_frames, 4, 8, dtype=torch.float64)
        return net(x, torch.full((1, 1), 500.0, dtype=torch.float64), Condition(torch.ones(1, 2, 8, dtype=torch.float64)), LAYOUT)

    def write(path: Path, frames: Tensor) -> None:
        drawn.append(frames.clone())
        path.with_suffix(".txt").write_text("x")

    watched.observers = (
        SampleGrid(every=2, draw=draw, write=write, folder=tmp_path / "samples", at_start=True),
        SampleGrid(every=2, draw=draw, write=write, folder=tmp_path / "samples", weights="reg"),
        Memory(),
        Profiler(folder=tmp_path / "traces", skip=1, active=1),
        Progress(max_iter=6),
    )
    watched.run()
    assert same(everything(plain.state), everything(watched.state))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == sorted(
        [f"iter_{i:09d}_{w}.txt" for i in (2, 4, 6) for w in ("ema", "reg")] + ["iter_000000000_ema.txt"]
    )
    assert not torch.equal(drawn[-1], drawn[-2]) and not any(frames.requires_grad for frames in drawn)
    assert (tmp_path / "traces" / "trace_rank0.json").is_file()


def test_lost_tangent_stops_the_first_step(tmp_path: Path) -> None:
    """A module that detaches is named; with the guard off, or after the first step, nobody
    looks.
    """

    def tangent_pass(iteration: int, v: Tensor) -> Tensor:
        ones = torch.ones(1, 32).double()
        jvp(lambda x: x + trainer.method.nets["student"].blocks[0].ffn(x), (ones,), (ones,))
        return v

    trainer = launch(tmp_path / "a", max_iter=1, fault=tangent_pass)
    ffn = trainer.method.nets["student"].blocks[0].ffn
    ffn[1].forward = lambda x: torch.nn.functional.gelu(x.detach())
    with pytest.raises(TangentLost, match=r"blocks\.0\.ffn\.1"):
        trainer.run()
    trainer = launch(tmp_path / "b", max_iter=1, fault=tangent_pass, guard_tangents=False)
    trainer.method.nets["student"].blocks[0].ffn[1].forward = lambda x: torch.nn.functional.gelu(x.detach())
    trainer.run()


def test_data_that_ends_and_bad_settings_are_errors(tmp_path: Path) -> None:
    trainer = launch(tmp_path, max_iter=5)
    trainer.loader = iter([next(trainer.loader)])
    with pytest.raises(RuntimeError, match="data ended at iteration 1"):
        trainer.run()
    for name in ("max_iter", "grad_accum_iter", "logging_iter"):
        with pytest.raises(ConfigError, match=name):
            TrainerConfig(**{name: 0})


def test_too_many_skipped_samples_stop_the_run() -> None:
    """nan_policy=skip_sample: 2 of 4 samples zeroed per step stop a run that allows 10 %, and not
    one that allows 60 %.
    """
    trainer = Trainer.__new__(Trainer)
    trainer.state, trainer._batch_size = SimpleNamespace(iteration=7), 4
    trainer.config = TrainerConfig(nan_policy="skip_sample", nan_sample_limit=0.6)
    trainer._judge_skipped({"tf_scm/nonfinite_samples": 2.0})
    trainer.config = TrainerConfig(nan_policy="skip_sample", nan_sample_limit=0.1)
    trainer._judge_skipped({"tf_scm/nonfinite_samples": 0.3, "loss/tf_scm": 100.0})
    with pytest.raises(NonFinite, match="50.0%.*iteration 7.*nan_sample_limit=0.1"):
        trainer._judge_skipped({"tf_scm/nonfinite_samples": 2.0})


@pytest.mark.parametrize(("ran", "told"), [(2, True), (3, False)])
def test_a_profile_of_a_run_that_ends_early(tmp_path: Path, warned: list[str], ran: int, told: bool) -> None:
    """Two skipped, two asked for: what there is of them is written, nothing is said."""
    launch(tmp_path, max_iter=ran, observers=[Profiler(folder=tmp_path / "traces", skip=2)]).run()
    assert (tmp_path / "traces" / "trace_rank0.json").is_file() != told
    assert any(f"trainer.profile_iter=2 skips all {ran} iterations" in line for line in warned) == told


def test_one_observer_that_fails_keeps_none_waiting(tmp_path: Path, warned: list[str]) -> None:
    """Others are collective: each is called, the checkpointer settles, then the run ends; of two
    that fail, both are told.
    """

    def full() -> None:
        raise OSError(28, "No space left on device", "kernels.json")

    called: list[str] = []
    seen = [full, lambda: called.append("gather"), lambda: called[9]]
    trainer = launch(tmp_path, max_iter=3, observers=[At(1, one) for one in seen])
    closed = SimpleNamespace(write=lambda *_: None, close=lambda: called[8])
    trainer.sinks, settle = (closed,), trainer.checkpointer.settle
    trainer.checkpointer.settle = lambda **limit: (called.append("settle"), settle(**limit))[1]
    with pytest.raises(OSError, match="No space left"):
        trainer.run()
    assert called == ["gather", "settle"]
    for said in ("another observer failed, too", "another failure as the run ended"):
        assert any(f"{said}: IndexError" in line for line in warned)
