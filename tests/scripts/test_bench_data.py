"""The benchmark of data runs at any size, leaves nothing behind, and refuses what it cannot do."""

from __future__ import annotations

import json

import pytest

from rcm.data import set_index
from scripts import bench_data

SMALL = ["--latents", "2x3x4x5", "--text", "6x7", "--samples", "18", "--seconds", "0.01", "--workers", "0", "2"]


def test_rows_of_a_loader(tmp_path, capsys):
    assert (
        bench_data.main([*SMALL, "--folder", str(tmp_path), "--batch", "2", "--step_seconds", "0.5", "--json", f"{tmp_path}/o.json"]) == 0
    )
    told, found = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())
    assert "18 samples [2, 3, 4, 5], [6, 7]" in told and "a step of 0.5 s takes 4.00 samples/s" in told
    assert [row["workers"] for row in found["rows"]] == [0, 2]
    for row in found["rows"]:
        assert row["times_the_need"] == pytest.approx(row["samples_per_second"] / 4)
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"]


def test_an_index_of_a_set_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "_SETTLE", 0)
    monkeypatch.setattr(set_index, "_SETTLED", -(10**15))
    assert bench_data.main(["--index", "3000", "--shards", "100", "--folder", str(tmp_path), "--json", f"{tmp_path}/o.json"]) == 0
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert (row["samples"], row["shards"]) == (3000, 100) and row["index_bytes"] > 3000 * 64 and row["position_bytes"] < 200
    assert "open_seconds" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["o.json"]
