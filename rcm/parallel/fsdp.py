"""FSDP2: shard parameters, gradients and optimiser state, and keep the master weights in another
dtype than the computation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from rcm.core.dtypes import Precision
from rcm.nets.frozen_fp8 import is_rounded
from rcm.parallel.host import fetch_back
from rcm.parallel.mesh import ParallelDims


def is_mixed(precision: Precision) -> bool:
    """Whether computation or gradient reduction uses another dtype than the stored parameters."""
    return not precision.params == precision.compute == precision.reduce


def shard_parameters(
    net: nn.Module,
    *,
    dims: ParallelDims,
    precision: Precision,
    host: bool = False,
) -> None:
    """Apply `fully_shard` to every block of `net`, if it has any, and to `net` itself, in place.

    Parameters are gathered in `precision.compute`, gradients averaged over all ranks in
    `precision.reduce`; inputs are not cast (a timestep cast to bf16 behind the network's back ruins
    tangents), the caller casts x. With dp_replicate > 1 parameters are replicated over that axis
    (HSDP). Every module, the root too, gives up what it gathered after each forward (see
    `gathered`): by default the root would stay gathered after a forward without gradient and then
    compute with stale weights. `host`: the stored parameters and their gradients live in host
    memory, whence every block is gathered.
    """
    pinned = dims.device_type == "cuda"
    policy_of_place = CPUOffloadPolicy(pin_memory=pinned) if host else OffloadPolicy()
    policy = MixedPrecisionPolicy(
        param_dtype=None if is_rounded(net) else precision.compute,
        reduce_dtype=precision.reduce,
        cast_forward_inputs=False,
    )
    for module in (*getattr(net, "blocks", ()), net):
        fully_shard(
            module,
            mesh=dims.fsdp_mesh,
            mp_policy=policy,
            reshard_after_forward=True,
            offload_policy=policy_of_place,
        )


@contextmanager
def gathered(net: nn.Module) -> Iterator[None]:
    """Within the context, parameters of `net` stay gathered from the first pass on, backward passes
    included: many short passes, as those of a rollout, gather them once. They may not be changed
    meanwhile. Does nothing without FSDP2.
    """
    _keep_gathered(net, True)
    try:
        yield
    finally:
        _keep_gathered(net, False)
        reshard(net)


def _keep_gathered(net: nn.Module, keep: bool) -> None:
    for module in _wrapped(net):
        module.set_reshard_after_forward(not keep, recurse=False)
        module.set_reshard_after_backward(not keep, recurse=False)


def _wrapped(net: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in net.modules() if isinstance(module, FSDPModule))


def reshard(net: nn.Module) -> None:
    """Drop gathered copies of parameters. Does nothing on a network without FSDP2."""
    for module in _wrapped(net):
        module.reshard()


def stored_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are stored and updated, by name.

    A module that was left gathered after a forward without gradient lists its gathered copies
    instead; reading or writing those would be lost. A network that waits in host memory comes back.
    """
    reshard(net)
    fetch_back(net)
    return dict(net.named_parameters())


def stored_tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of stored (not gathered) tensors, detached, sharing memory with the
    network, which comes back if it waits in host memory.
    """
    reshard(net)
    fetch_back(net)
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


def set_gradient_sync(net: nn.Module, enabled: bool) -> None:
    """Whether the next backward passes reduce gradients (True) or keep them unreduced on every
    rank. Does nothing without FSDP2.
    """
    root = next(_wrapped(net), None)
    if root is not None:
        root.set_requires_gradient_sync(enabled)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard that this rank stores, sharing memory with `tensor`; a plain tensor is its own
    shard.
    """
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
