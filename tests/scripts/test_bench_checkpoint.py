"""The benchmark of checkpoints compares what it reads, computes from what it measured, and leaves
nothing behind.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rcm.core.errors import CheckpointError
from rcm.train import checkpoint
from scripts import bench_checkpoint

TINY = ["--size", "tiny", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_checkpoint, "DISK_BYTES", 2**20)


def test_a_round_trip_and_what_follows(tmp_path: Path, capsys):
    words = ["--folder", str(tmp_path), "--of", "1.3B", "--gpus", "8", "--json", f"{tmp_path}/o.json"]
    assert bench_checkpoint.main([*TINY, *words]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    measured, computed = found["measured"], found["computed"]
    assert measured["gb_per_rank"] * 1e9 == pytest.approx(measured["parameters"] * 16, rel=1e-2)
    assert 1.41e9 * 16 / 8 < computed["gb_per_rank"] * 1e9 < 1.43e9 * 16 / 8
    rate = measured["saved in the background, 1"]["gb_per_s_stall"]
    assert computed["stall_in_the_background_s"] == pytest.approx(computed["gb_per_rank"] / rate)
    assert "computed, not measured, for 1.3B on 8" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"]


@pytest.mark.slow
def test_other_numbers_are_not_timed(tmp_path: Path, capsys, monkeypatch):
    """A load that changes nothing."""
    monkeypatch.setattr(checkpoint, "restore", lambda *_, **__: None)
    assert bench_checkpoint.main([*TINY, "--folder", str(tmp_path)]) == 2
    assert "tensors came back otherwise, the first is " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, capsys, monkeypatch):
    def broken(*_, **__):
        raise CheckpointError("the disk is on fire")

    monkeypatch.setattr(checkpoint.Checkpointer, "_publish", broken)
    assert bench_checkpoint.main([*TINY, "--folder", str(tmp_path)]) == 2
    assert "the disk is on fire" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_room(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(bench_checkpoint.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 10**6}))
    assert bench_checkpoint.main([*TINY, "--folder", str(tmp_path)]) == 2
    assert "two checkpoints take 0 GB; choose another --folder, or fewer --blocks" in capsys.readouterr().err
