"""From the meta device to weights: build without memory, materialise the local shards, fill them,
and prove that replicas agree.

The full state dict exists on rank 0 alone, one tensor at a time travels to the others; a DCP
directory is read by every rank, each taking its own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rcm.core.errors import CheckpointError
from rcm.nets.frozen_fp8 import load_rows, scales_of
from rcm.parallel.agree import agree, on_first, spread, together
from rcm.parallel.fsdp import local, stored_tensors
from rcm.parallel.host import sharded_like, zeros_on_host
from rcm.parallel.mesh import ParallelDims
from rcm.storage.dcp_folder import DcpFolder
from rcm.storage.state_dicts import check_keys, shapes_of

N = TypeVar("N", bound=nn.Module)


def on_meta(build: Callable[[], N]) -> N:
    """The network that `build` makes, with shapes but no memory."""
    with torch.device("meta"):
        return build()


def materialise(net: N, *, device: torch.device | str, pinned: bool = False) -> N:
    """Give a network built on meta (already sharded or not) memory on `device`, `pinned` where that
    is the host and passes compute on a GPU. Its values are undefined until loaded; return `net`.
    """
    if pinned:  # as `to_empty`, in memory that FSDP2 has no need to copy into pinned one
        return net._apply(lambda t: sharded_like(zeros_on_host(local(t), pinned=True), t))
    return net.to_empty(device=device)


def load_full(
    net: nn.Module, weights: Mapping[str, Tensor] | None, *, source: str = "state dict"
) -> None:
    """Load a full (unsharded) state dict, strictly, into a network that may be sharded. Collective.

    `weights` is read on rank 0 only, one tensor at a time, and may be None elsewhere; a
    `LazyWeights` is checked before anything is read. Dtypes are converted to the parameters';
    weights in e4m3 take the rows that this rank holds, rounded, with their scales.
    Raises CheckpointError on every rank, naming keys and shapes, when it does not fit (then no
    weight has changed), or naming the tensor that could not be read (then the network is
    incomplete).
    """
    stored = stored_tensors(net)
    scales = scales_of(stored)
    targets = {name: t for name, t in stored.items() if name not in scales.values()}

    def check() -> None:
        if weights is None:
            raise CheckpointError(f"{source}: no weights were given on rank 0")
        check_keys(source, shapes=shapes_of(weights), expected=shapes_of(targets))

    on_first(check)
    for name, target in targets.items():
        shard = local(target)
        dtype = torch.float32 if name in scales else target.dtype
        full = _received(name, target, weights, dtype=dtype, device=shard.device, source=source)
        part = (
            distribute_tensor(
                full, target.device_mesh, target.placements, src_data_rank=None
            ).to_local()
            if isinstance(target, DTensor)
            else full
        )
        if name in scales:
            load_rows(shard, local(stored[scales[name]]), part)
        else:
            shard.copy_(part)


def _received(
    name: str,
    target: Tensor,
    weights: Mapping[str, Tensor] | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str,
) -> Tensor:
    """One full tensor of the shape of `target` on every rank, read on rank 0."""
    full: Tensor | None = None
    problem: CheckpointError | None = None
    try:
        if not spread() or dist.get_rank() == 0:
            assert weights is not None  # checked
            full = weights[name].to(device=device, dtype=dtype).contiguous()
    except Exception as error:
        says_it_all = isinstance(error, CheckpointError)
        told = (
            error
            if says_it_all
            else f"{source}: {name} could not be read ({type(error).__name__}: {error})"
        )
        problem = CheckpointError(f"{told}; the network is incomplete now")
        if not spread():
            raise problem from error
    if full is not None and not spread():
        return full
    # one byte per tensor instead of a pickled object: several hundred of these travel per network
    ready = torch.tensor([problem is None], dtype=torch.uint8, device=device)
    dist.broadcast(ready, src=0)
    if not ready.item():
        agree(problem)
    if full is None:
        full = torch.empty(target.shape, dtype=dtype, device=device)
    dist.broadcast(full, src=0)
    return full


def load_dcp(net: nn.Module, directory: str | Path, *, prefix: str = "net.") -> None:
    """Load the tensors `prefix`+key of a DCP directory, strictly, into a network sharded in any
    way. Collective.

    Raises CheckpointError when the directory is no DCP checkpoint, or naming missing, unexpected
    and misshapen keys under `prefix`.
    """
    folder = together(lambda: DcpFolder(directory))
    expected = {prefix + name: tensor for name, tensor in stored_tensors(net).items()}
    check_keys(
        f"{directory} ({prefix}*)",
        shapes={k: v for k, v in shapes_of(folder).items() if k.startswith(prefix)},
        expected=shapes_of(expected),
    )
    folder.load_into(expected)


def drawn_weights(build: Callable[[], nn.Module], *, seed: int) -> dict[str, Tensor]:
    """Random weights of the network that `build` makes, the same for every world size: for
    `load_full` on rank 0, which holds the whole network in CPU memory meanwhile. For networks
    trained from scratch (the toy world, ablations).
    """
    full: Any = build()
    full.init_weights(torch.Generator().manual_seed(seed))
    return full.state_dict()


def check_equal(net: nn.Module, *, dims: ParallelDims) -> None:
    """Raise CheckpointError naming the first tensor whose shards differ between replicas (ranks of
    one place on the dp_replicate axis). Collective.
    """
    if dims.dp_replicate == 1:
        return
    group = dims.fsdp_mesh.get_group("dp_replicate")
    for name, tensor in stored_tensors(net).items():
        shard = local(tensor)
        if shard.itemsize == 1:  # no reduction compares numbers of e4m3
            shard = shard.view(torch.uint8)
        low, high = shard.clone(), shard.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
        differs = torch.tensor([float(not torch.equal(low, high))], device=shard.device)
        dist.all_reduce(differs, op=dist.ReduceOp.MAX)
        if differs.item():
            raise CheckpointError(
                f"{name} differs between model replicas after loading; the ranks did not read the"
                " same weights"
            )
