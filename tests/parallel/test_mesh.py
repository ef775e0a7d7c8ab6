"""Sizes, ranks and error messages of the parallel axes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from rcm.core.errors import ConfigError
from rcm.parallel.mesh import ParallelDims, process_group


@contextmanager
def pretend(rank: int, world: int) -> Iterator[None]:
    """A process group without other processes."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_one_rank_needs_no_process_group() -> None:
    dims = ParallelDims()
    assert (dims.world_size, dims.rank, dims.data_rank, dims.cp_rank, dims.num_data_ranks) == (1, 0, 0, 0, 1)
    with pytest.raises(ConfigError, match="process group"):
        _ = dims.fsdp_mesh


def test_plan_from_the_public_keys() -> None:
    """14B: 32 shards holding 8-way context parallelism on 64 GPUs; 1.3B: 4 shards, no context
    parallelism, on 8.
    """
    assert ParallelDims.plan(64, fsdp_shard_size=32, cp=8) == ParallelDims(2, 4, 8)
    assert ParallelDims.plan(8, fsdp_shard_size=4, cp=1) == ParallelDims(2, 4, 1)
    assert ParallelDims.plan(2, fsdp_shard_size=1, cp=1) == ParallelDims(2, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "knob"),
    [
        ({"world_size": 8, "fsdp_shard_size": 3, "cp": 1}, "fsdp_shard_size"),
        ({"world_size": 8, "fsdp_shard_size": 8, "cp": 3}, "context_parallel_size"),
        ({"world_size": 8, "fsdp_shard_size": 2, "cp": 4}, "fsdp_shard_size=2 must be a multiple"),
    ],
)
def test_impossible_plans_name_the_knob(arguments: dict[str, int], knob: str) -> None:
    world = arguments.pop("world_size")
    with pytest.raises(ConfigError, match=knob):
        ParallelDims.plan(world, **arguments)


def test_heads_tokens_and_world_are_checked() -> None:
    dims = ParallelDims(1, 1, 8)
    with pytest.raises(ConfigError, match=r"12.*context_parallel_size"):
        dims.check(num_heads=12)
    with pytest.raises(ConfigError, match="1500"):
        dims.check(tokens_per_frame=1500)
    with pytest.raises(ConfigError, match="8"):
        dims.check(world_size=4)
    dims.check(num_heads=40, tokens_per_frame=1560, world_size=8)
    with pytest.raises(ConfigError, match="cp=0"):
        ParallelDims(1, 1, 0)


@pytest.mark.parametrize("rank", range(8))
def test_axes_of_every_rank(rank: int) -> None:
    """World 8 as 2 x 2 x 2: parameters are sharded over the 4 neighbours, data is shared by 2."""
    with pretend(rank, 8):
        dims = ParallelDims(2, 2, 2)
        assert (dims.data_rank, dims.cp_rank) == (rank // 2, rank % 2)
        mesh = dims.fsdp_mesh
        assert mesh.mesh_dim_names == ("dp_replicate", "shard") and tuple(mesh.get_coordinate()) == (rank // 4, rank % 4)
        assert dist.get_process_group_ranks(dims.cp_group) == [rank - rank % 2, rank - rank % 2 + 1]
    with pretend(rank, 8):
        assert ParallelDims(1, 4, 2).fsdp_mesh.mesh_dim_names == ("shard",)
        with pytest.raises(ConfigError, match="4"):
            _ = ParallelDims(1, 4, 1).fsdp_mesh


def test_process_group_of_one_is_left_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu") as device:
        assert device.type == "cpu" and dist.get_world_size() == 1
        with process_group("cpu"):
            assert dist.is_initialized()
        assert dist.is_initialized()
    assert not dist.is_initialized()
