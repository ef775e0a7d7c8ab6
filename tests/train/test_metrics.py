"""Means, sinks, and the progress line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.train.metrics import Averages, JsonLines, Wandb, require_wandb
from rcm.train.observers import KernelRecord, Progress, SampleGrid
from tests.train.run_support import launch


def test_means_are_over_the_steps_that_had_the_number() -> None:
    averages = Averages()
    averages.add({"a": torch.tensor(1.0, requires_grad=True), "b": 4.0})
    averages.add({"a": torch.tensor(2.0)})
    assert averages.collect(device="cpu") == {"a": 1.5, "b": 4.0}
    assert averages.collect(device="cpu") == {}


def test_large_counts_lose_no_digits() -> None:
    """Sums are float64: 2^24 + 1 in float32 would be 2^24."""
    averages = Averages()
    averages.add({"a": torch.tensor(2.0**24)})
    averages.add({"a": torch.tensor(1.0)})
    assert averages.collect(device="cpu") == {"a": (2.0**24 + 1) / 2}


def test_json_lines_are_complete_at_once_and_drop_what_will_be_run_again(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "deep" / "m.jsonl")
    for step in (1, 2, 3):
        sink.write(step, {"x": step / 2})
    assert [json.loads(line)["step"] for line in (tmp_path / "deep" / "m.jsonl").read_text().splitlines()] == [1, 2, 3]
    sink.close()
    with open(tmp_path / "deep" / "m.jsonl", "a") as file:
        file.write('{"step": "1"\n{"step": "one"}\n{"step": null}\n[1]\n1\n{}\n{"step": 4')
    again = JsonLines(tmp_path / "deep" / "m.jsonl", resumed_at=2)
    again.write(3, {"x": 9.0})
    again.close()
    assert [json.loads(line) for line in (tmp_path / "deep" / "m.jsonl").read_text().splitlines()][1:] == [
        {"step": 2, "x": 1.0},
        {"step": 3, "x": 9.0},
    ]


def test_missing_wandb_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rcm\[wandb\]'"):
        Wandb(project="p", name="n", directory=tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What a stand-in for wandb is told."""
    told: list[object] = []
    run = SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: told.append(options) or run))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return told


def test_wandb_gets_the_numbers_and_a_resumed_run_is_the_same_one(tmp_path: Path, calls: list) -> None:
    for step in (3, 4):
        sink = Wandb(project="p", name="n", entity="team", group="g", directory=tmp_path / "w", mode="offline", config={"a": 1})
        sink.write(step, {"x": 1.0})
        sink.close()
    first, _, _, second, *_ = calls
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 12
    assert (first["entity"], first["group"], first["mode"], first["config"]) == ("team", "g", "offline", {"a": 1})
    assert calls[1:3] == [(3, {"x": 1.0}), "finish"]
    Wandb(project="p", name="n", directory=tmp_path / "other", mode="offline")
    assert calls[-1]["id"] != first["id"] and calls[-1]["entity"] is None


def test_wandb_online_needs_a_key(tmp_path: Path, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"needs a key for api\.wandb\.ai: run `wandb login`"):
        require_wandb("online")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    require_wandb("online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    require_wandb("offline")


def test_progress_writes_to_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, is_main, expected in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        progress = Progress(max_iter=4, stream=stream)
        progress.started(SimpleNamespace(iteration=0))
        for iteration in (1, 4):
            progress.stepped(SimpleNamespace(iteration=iteration), is_main=is_main)
        assert ("4/4" in stream.getvalue()) is expected
        assert stream.getvalue().endswith("\n") is expected


def test_sample_grid_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every"):
        SampleGrid(every=0, draw=None, write=None, folder=tmp_path)
    with pytest.raises(ConfigError, match="weights"):
        SampleGrid(every=1, draw=None, write=None, folder=tmp_path, weights="best")


def test_kernels_are_recorded_when_they_were_used(tmp_path: Path) -> None:
    """After the first step the file names what served each kind of call; it is written again only
    when something new ran.
    """
    launch(tmp_path / "job", max_iter=2, observers=[KernelRecord(tmp_path / "kernels.json", watched=1)]).run()
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["student"]["fused_layers"] == "auto"
    assert found["student"]["attention"]["backend"] in ("auto", "sdpa", "reference")
    assert found["student"]["attention"]["calls"]
    before = (tmp_path / "kernels.json").stat().st_mtime_ns
    launch(tmp_path / "job", max_iter=3, observers=[KernelRecord(tmp_path / "other.json", watched=0)]).run()
    assert not (tmp_path / "other.json").exists() and (tmp_path / "kernels.json").stat().st_mtime_ns == before
