"""megatron-core's `parallel_state` over our ranks: the package itself where it is installed, else a
stand-in that lays its ranks out as megatron documents.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
import torch.distributed as dist

from rcm.core.errors import ConfigError
from rcm.parallel.megatron import MODULE, initialize_megatron
from rcm.parallel.mesh import ParallelDims
from tests.parallel.test_mesh import pretend

HERE = all(importlib.util.find_spec(name) is not None for name in ("megatron", "einops"))
real = pytest.mark.skipif(not HERE, reason="megatron-core is not installed with einops")


def stand_in(order: str = "cp-dp") -> types.ModuleType:
    """Ranks of the order "tp-cp-ep-dp-pp" with one rank in tp, ep and pp."""
    state, groups = types.ModuleType(MODULE), {}

    def initialize_model_parallel(*, context_parallel_size, num_distributed_optimizer_instances, create_gloo_process_groups):
        world, cp = dist.get_world_size(), context_parallel_size
        table = torch.arange(world).reshape(-1, cp) if order == "cp-dp" else torch.arange(world).reshape(cp, -1).T
        apart = table.flatten().chunk(num_distributed_optimizer_instances)
        for name, rows in {"cp": table, "dp": table.T, "all": [table.flatten()], "apart": apart}.items():
            for ranks in (row.tolist() for row in rows):
                group = dist.new_group(ranks)
                if dist.get_rank() in ranks:
                    groups[name] = group

    def get_data_parallel_group(with_context_parallel=False, partial_data_parallel=False):
        return groups["apart" if partial_data_parallel else "all" if with_context_parallel else "dp"]

    state.initialize_model_parallel = initialize_model_parallel
    state.model_parallel_is_initialized = lambda: bool(groups)
    state.get_context_parallel_group = lambda: groups["cp"]
    state.get_data_parallel_group = get_data_parallel_group
    state.destroy_model_parallel = groups.clear
    return state


def install(monkeypatch: pytest.MonkeyPatch, state: types.ModuleType) -> None:
    for name in ("megatron", "megatron.core"):
        package = types.ModuleType(name)
        package.__path__, package.__spec__ = [], types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, MODULE, state)


def present(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)


@pytest.fixture(params=["stand-in", pytest.param("megatron-core", marks=real)])
def megatron(request, monkeypatch):
    if request.param == "stand-in":
        install(monkeypatch, stand_in())
        present(monkeypatch, "megatron", "einops")


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (2, 4, 1), (1, 1, 8), (8, 1, 1)])
def test_groups_hold_the_ranks_of_our_meshes(megatron, sizes, rank):
    with pretend(rank, 8):
        dims = ParallelDims(*sizes)
        state = initialize_megatron(dims)
        cp, shard = sizes[2], sizes[1] * sizes[2]
        assert dist.get_process_group_ranks(state.get_context_parallel_group()) == [rank // cp * cp + i for i in range(cp)]
        assert dist.get_process_group_ranks(state.get_data_parallel_group()) == list(range(rank % cp, 8, cp))
        sharding = state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=sizes[0] > 1)
        assert dist.get_process_group_ranks(sharding) == [rank // shard * shard + i for i in range(shard)]
        with pytest.raises(ConfigError, match="initialised already: call its destroy_model_parallel"):
            initialize_megatron(dims)
        state.destroy_model_parallel()


def test_another_order_of_ranks_is_refused(monkeypatch):
    state = stand_in(order="dp-cp")
    install(monkeypatch, state)
    present(monkeypatch, "megatron")
    with pretend(0, 8), pytest.raises(ConfigError, match=r"context parallel group .* \[0, 4\], ours \[0, 1\]"):
        initialize_megatron(ParallelDims(1, 4, 2))
    assert not state.model_parallel_is_initialized()


def test_a_missing_package_says_what_to_install(monkeypatch):
    present(monkeypatch)
    with pytest.raises(ConfigError, match="megatron-core is not installed.*pip install megatron-core"):
        initialize_megatron(ParallelDims())
    present(monkeypatch, "megatron")
    with pytest.raises(ConfigError, match=r"needs einops .*\(dp_replicate=2\).*pip install einops"):
        initialize_megatron(ParallelDims(2, 2, 2))


def test_a_package_without_the_core_does_not_load(monkeypatch):
    present(monkeypatch, "megatron")
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(ConfigError, match=r"parallel_state does not load \(.*\): pip install megatron-core"):
        initialize_megatron(ParallelDims())
