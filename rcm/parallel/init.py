"""From the meta device to weights: build without memory, materialise the local shards, fill them, and prove that replicas agree.

The full state dict exists on rank 0 alone, one tensor at a time travels to the others; a DCP directory is read by every rank, each taking
its own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor, distribute_tensor

from rcm.core.errors import CheckpointError
from rcm.parallel.fsdp import local, stored_tensors
from rcm.parallel.mesh import ParallelDims


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` makes, with shapes but no memory."""
    with torch.device("meta"):
        return build()


def materialise(net: nn.Module, *, device: torch.device | str) -> nn.Module:
    """Give a network built on meta (already sharded or not) memory on `device`. Its values are undefined until loaded; return `net`."""
    return net.to_empty(device=device)


def _report(keys: set[str]) -> str:
    shown = sorted(keys)[:5]
    return ", ".join(shown) + (f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else "")


def check_keys(source: str, *, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError naming missing, unexpected and misshapen tensors of `source` against what the network expects."""
    problems = []
    if missing := set(expected) - set(shapes):
        problems.append(f"missing {len(missing)} key(s): {_report(missing)}")
    if extra := set(shapes) - set(expected):
        problems.append(f"{len(extra)} unexpected key(s): {_report(extra)}")
    wrong = [
        f"{key} has shape {tuple(shapes[key])}, expected {tuple(expected[key])}"
        for key in expected
        if key in shapes and tuple(shapes[key]) != tuple(expected[key])
    ]
    if wrong:
        problems.append(f"{len(wrong)} tensor(s) of another shape: " + "; ".join(wrong[:3]))
    if problems:
        raise CheckpointError(f"{source} does not fit this network: " + "; ".join(problems))


def load_full(net: nn.Module, weights: Mapping[str, Tensor] | None, *, source: str = "state dict") -> None:
    """Load a full (unsharded) state dict, strictly, into a network that may be sharded. Collective.

    `weights` is read on rank 0 only and may be None elsewhere; dtypes are converted to the parameters'. Raises CheckpointError on every
    rank, naming keys and shapes, when it does not fit.
    """
    targets = stored_tensors(net)
    verdict: list[str | None] = [None]
    if weights is not None:
        try:
            check_keys(
                source, shapes={k: tuple(v.shape) for k, v in weights.items()}, expected={k: tuple(v.shape) for k, v in targets.items()}
            )
        except CheckpointError as error:
            verdict[0] = str(error)
    spread = dist.is_initialized() and dist.get_world_size() > 1
    if spread:
        dist.broadcast_object_list(verdict, src=0)
    elif weights is None:
        raise CheckpointError(f"{source}: no weights were given on rank 0")
    if verdict[0]:
        raise CheckpointError(verdict[0])
    for name, target in targets.items():
        shard = local(target)
        if weights is not None:
            full = weights[name].to(device=shard.device, dtype=target.dtype).contiguous()
        else:
            full = torch.empty(target.shape, dtype=target.dtype, device=shard.device)
        if spread:
            dist.broadcast(full, src=0)
        part = (
            distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None).to_local()
            if isinstance(target, DTensor)
            else full
        )
        shard.copy_(part)


def load_dcp(net: nn.Module, directory: str | Path, *, prefix: str = "net.") -> None:
    """Load the tensors `prefix`+key of a DCP directory, strictly, into a network sharded in any way. Collective.

    Raises CheckpointError when the directory is no DCP checkpoint, or naming missing, unexpected and misshapen keys under `prefix`.
    """
    found = dcp_shapes(directory)
    expected = {prefix + name: tensor for name, tensor in stored_tensors(net).items()}
    check_keys(
        f"{directory} ({prefix}*)",
        shapes={k: v for k, v in found.items() if k.startswith(prefix)},
        expected={k: tuple(v.shape) for k, v in expected.items()},
    )
    dcp.load(expected, checkpoint_id=str(directory), no_dist=not dist.is_initialized())


def dcp_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor in a DCP directory. Raises CheckpointError when `directory` is none."""
    if not (Path(directory) / ".metadata").is_file():
        raise CheckpointError(
            f"{directory} is not a DCP checkpoint: it has no .metadata file (an interrupted save, or another path is meant)"
        )
    try:
        entries = FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"{directory}/.metadata cannot be read ({type(error).__name__}: {error}); it is damaged") from error
    return {key: tuple(entry.size) for key, entry in entries.items() if hasattr(entry, "size")}


def initialise(net: nn.Module, build: Callable[[], nn.Module], *, seed: int) -> None:
    """Random weights, the same for every world size: rank 0 builds the network on CPU with `build`, calls `init_weights(generator)`, and
    sends it out.

    For networks trained from scratch (the embedded world, ablations): rank 0 holds the whole network in CPU memory meanwhile.
    """
    weights = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        full = build()
        full.init_weights(torch.Generator().manual_seed(seed))
        weights = full.state_dict()
    load_full(net, weights, source="initial weights")


def check_equal(net: nn.Module, *, dims: ParallelDims) -> None:
    """Raise CheckpointError naming the first tensor whose shards differ between replicas (ranks of one place on the dp_replicate axis).
    Collective.
    """
    if dims.dp_replicate == 1:
        return
    group = dims.fsdp_mesh.get_group("dp_replicate")
    for name, tensor in stored_tensors(net).items():
        shard = local(tensor)
        low, high = shard.clone(), shard.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
        differs = torch.tensor([float(not torch.equal(low, high))], device=shard.device)
        dist.all_reduce(differs, op=dist.ReduceOp.MAX)
        if differs.item():
            raise CheckpointError(f"{name} differs between model replicas after loading; the ranks did not read the same weights")
