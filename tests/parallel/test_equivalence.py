"""Two and four ranks compute what one rank computes: losses, gradients, tangents, streamed chunks,
for FSDP2, HSDP, Ulysses and their combinations.

Float64, so that a wrong permutation or a missing factor cannot hide in rounding. One group of
processes per world size serves all combinations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rcm.parallel.ulysses as ulysses
from rcm.core.rng import StepRng
from rcm.parallel.mesh import ParallelDims
from tests.parallel.parallel_probe import build, measure, worst
from tests.support.dist import run_ranks

COMBINATIONS = {
    2: {"shard 2": (1, 2, 1, "block_wise"), "replicate 2": (2, 1, 1, "none"), "cp 2": (1, 1, 2, "mm_only")},
    4: {
        "shard 2 x cp 2": (1, 2, 2, "block_wise"),
        "replicate 2 x cp 2": (2, 1, 2, "none"),
        "cp 4": (1, 1, 4, "none"),
        "hsdp": (2, 2, 1, "mm_only"),
    },
}


def on_every_rank(world: int) -> dict[str, Any]:
    """Results of all combinations of `world` ranks, and of two broken exchanges."""
    results: dict[str, Any] = {}
    for name, (replicate, shard, cp, checkpoint) in COMBINATIONS[world].items():
        dims = ParallelDims(replicate, shard, cp)
        results[name] = measure(dims, build(dims, checkpoint=checkpoint))
        draw = torch.randn(4, generator=StepRng(0, 5, dims.data_rank).generator("noise"))
        results[name]["draw"] = (dims.data_rank, dims.cp_rank, draw.tolist())
    sound = ulysses._exchange
    ulysses._exchange = lambda pieces, group: sound(pieces, group).flip(0)
    dims = ParallelDims(1, 1, world)
    results["permuted"] = measure(dims, build(dims))
    return results


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    dims = ParallelDims()
    return measure(dims, build(dims, checkpoint="none"))


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_rank_computes(world: int, truth: dict[str, Any], tmp_path: Path) -> None:
    """Also: the same after an ordinary forward and backward on the sharded network, and unchanged
    state-dict keys under every wrapper.
    """
    assert truth["tangent"].abs().max() > 1e-2 and truth["streamed_dot"].abs().max() > 1e-2
    for rank, results in enumerate(run_ranks(world, on_every_rank, world, tmp_path=tmp_path)):
        broken = results.pop("permuted")
        for key in ("value", "tangent", "grads", "streamed_dot"):
            assert worst(broken[key], truth[key]) > 1e-3, f"a permuted all-to-all went unnoticed in {key}"
        draws = {}
        for name, found in results.items():
            draws[name] = found.pop("draw")
            for key in truth:
                assert worst(found[key], truth[key]) < 1e-9, f"{name}, {key}, rank {rank}"
        for data_rank, _, numbers in draws.values():
            expected = torch.randn(4, generator=StepRng(0, 5, data_rank).generator("noise")).tolist()
            assert numbers == expected


@pytest.mark.dist
def test_ranks_of_a_cp_group_share_data_and_noise(tmp_path: Path) -> None:
    """Four ranks as 2 data x 2 cp: ranks 0, 1 agree, ranks 2, 3 agree, and the pairs differ, in
    data batches as in random draws.
    """
    drawn = run_ranks(4, draw_and_read, tmp_path=tmp_path)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and drawn[0] != drawn[2]
    assert drawn[0]["noise"] != drawn[2]["noise"] and drawn[0]["keys"] != drawn[2]["keys"]


def draw_and_read() -> dict[str, Any]:
    """First batch's keys and first draw of this rank."""
    from tests.support.toy_method import make_loader

    dims = ParallelDims(1, 2, 2)
    batch = next(iter(make_loader(dims=dims)))
    return {"keys": batch.keys, "noise": torch.randn(3, generator=StepRng(1, 2, dims.data_rank).generator("noise")).tolist()}
