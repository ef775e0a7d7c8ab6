"""Exactness of two and four ranks against one, by the script that shows it on GPUs, on gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rcm.core.errors import ConfigError
from scripts import bench_multi_gpu
from tests.support.dist import run_ranks

SMALL = ["--device", "cpu", "--small", "--layers", "1", "--dim", "512"]


def ran(*words: str) -> int:
    """Exit status of the script in this rank's group."""
    return bench_multi_gpu.main([*SMALL, *words])


@pytest.mark.slow
@pytest.mark.dist
def test_every_layout_of_four_ranks_equals_one_rank(tmp_path: Path) -> None:
    truth, result = str(tmp_path / "truth.pt"), tmp_path / "result.json"
    assert run_ranks(1, ran, "--truth", truth, tmp_path=tmp_path) == [0]
    assert run_ranks(4, ran, "--truth", truth, "--json", str(result), tmp_path=tmp_path) == [0] * 4
    rows = json.loads(result.read_text())["rows"]
    layouts = {"FSDP2 over 4", "Ulysses over 4", "FSDP2 over 2 x Ulysses 2", "HSDP 2 x 2"}
    assert {row["ranks"] for row in rows} == layouts and len(rows) == 2 * len(layouts)
    for row in rows:
        exact = row["size"].startswith("fp32")
        assert max(row["v"], row["v_dot"], row["grad"]) < (1e-5 if exact else 1e-2), row


def test_layouts_by_number_of_ranks() -> None:
    for ranks in (1, 2, 4, 8):
        found = bench_multi_gpu.combinations(ranks, heads=8)
        assert all(copies * shard * context == ranks for copies, shard, context in found.values())
        assert len(found) == {1: 1, 2: 2}.get(ranks, 4)
    with pytest.raises(ConfigError, match="6 ranks cannot share 2 samples evenly"):
        bench_multi_gpu.combinations(6, heads=12)
    with pytest.raises(ConfigError, match="--dim 1536 has 12 head.* 8 ranks .* a multiple of 1024"):
        bench_multi_gpu.combinations(8, heads=12)  # before any layout is run


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    """And is no difference of numbers."""
    with pytest.raises(ConfigError, match="--truth .*/none.pt is not there; write it first"):
        bench_multi_gpu.read_truth(tmp_path / "none.pt")
    truth = {"grad.w": torch.ones(3), "v.0": torch.ones(2)}
    for wrong in ({}, {**truth, "grad.b": torch.ones(1)}, {**truth, "v.0": torch.ones(3)}):
        with pytest.raises(ConfigError, match="t.pt is of another network; write it anew"):
            bench_multi_gpu.require_alike(truth, wrong, Path("t.pt"))
    both = {**truth, "v.1": torch.ones(2)}
    bench_multi_gpu.require_alike(truth, both, Path("t.pt"))  # a rank has some of the samples


def test_a_wrong_gradient_cannot_hide() -> None:
    """One entry of one tensor off, and a key's bias that cancels: the first counts, the second is
    named.
    """
    truth = {"grad.w": torch.ones(100), "grad.b": torch.full((1,), 1e-6), "v.0": torch.ones(3)}
    found = {**truth, "grad.w": truth["grad.w"].clone(), "grad.b": torch.full((1,), 2e-6)}
    found["grad.w"][7] = 2.0
    row = bench_multi_gpu.compare(found, truth)
    assert row["grad"] == pytest.approx(0.1) and row["v"] == 0
    assert row["worst_grad_of"] == "b" and row["worst_grad"] == pytest.approx(1)
