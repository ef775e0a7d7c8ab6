"""megatron-core's `parallel_state` over our ranks, for code that asks it who computes what.

Ranks are laid out alike (context parallelism fastest, then data, then copies), so its groups hold
the same ranks as the meshes of `ParallelDims`; that is checked, not assumed. Nothing in this
package reads it.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch.distributed as dist

from rcm.core.errors import ConfigError, first_line
from rcm.parallel.mesh import ParallelDims

MODULE = "megatron.core.parallel_state"


def initialize_megatron(dims: ParallelDims) -> ModuleType:
    """Initialise `megatron.core.parallel_state` (0.12 and later) with the axes of `dims` and one
    tensor- and one pipeline-parallel rank; returns the module. Collective.

    `dp_replicate` copies become its instances of the distributed optimizer. Raises `ConfigError`
    without megatron-core, for copies without einops, where it is initialised already (its
    `destroy_model_parallel` undoes that), and for a group of it that holds other ranks than ours.
    """
    if importlib.util.find_spec("megatron") is None:
        raise ConfigError(
            "megatron-core is not installed, whose parallel_state was to be initialised: pip"
            " install megatron-core, or do without it, nothing else needs it"
        )
    if dims.dp_replicate > 1 and importlib.util.find_spec("einops") is None:
        raise ConfigError(
            f"megatron-core needs einops for more than one copy (dp_replicate={dims.dp_replicate})"
            " and does not ask for it: pip install einops"
        )
    try:
        state = importlib.import_module(MODULE)
    except Exception as error:  # another package of that name, or a build for another torch
        raise ConfigError(
            f"{MODULE} does not load ({first_line(error)}): pip install megatron-core (0.12 or"
            " later), or do without it, nothing else needs it"
        ) from error
    if state.model_parallel_is_initialized():
        raise ConfigError(
            f"{MODULE} is initialised already: call its destroy_model_parallel() before"
            " initialize_megatron"
        )
    ours = _groups(dims)
    state.initialize_model_parallel(
        context_parallel_size=dims.cp,
        num_distributed_optimizer_instances=dims.dp_replicate,
        create_gloo_process_groups=False,
    )
    sharded = {"with_context_parallel": True, "partial_data_parallel": dims.dp_replicate > 1}
    theirs = {
        "context parallel": state.get_context_parallel_group(),
        "data parallel": state.get_data_parallel_group(),
        "sharding": state.get_data_parallel_group(**sharded),
    }
    for name, group in theirs.items():
        ranks = dist.get_process_group_ranks(group)
        if ranks != ours[name]:
            state.destroy_model_parallel()
            raise ConfigError(
                f"the {name} group of {MODULE} holds the ranks {ranks}, ours {ours[name]}; use"
                " megatron-core 0.12 or later with its default order of axes"
            )
    return state


def _groups(dims: ParallelDims) -> dict[str, list[int]]:
    """Ranks of this process's groups, by what megatron calls them."""
    meshes = {
        "context parallel": (dims.data_mesh, "cp"),
        "data parallel": (dims.data_mesh, "data"),
        "sharding": (dims.fsdp_mesh, "shard"),
    }
    return {
        name: dist.get_process_group_ranks(mesh.get_group(axis))
        for name, (mesh, axis) in meshes.items()
    }
