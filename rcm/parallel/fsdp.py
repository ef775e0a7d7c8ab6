"""FSDP2: shard parameters, gradients and optimiser state, and keep the master weights in another
dtype than the computation.
"""

from __future__ import annotations

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
    reshard_after_forward: bool = True,
    host: bool = False,
) -> None:
    """Apply `fully_shard` to every block of `net`, if it has any, and to `net` itself, in place.

    Parameters are gathered in `precision.compute`, gradients averaged over all ranks in
    `precision.reduce`; inputs are not cast (a timestep cast to bf16 behind the network's back ruins
    tangents), the caller casts x. With dp_replicate > 1 parameters are replicated over that axis
    (HSDP). `reshard_after_forward` False keeps gathered blocks until the backward pass: faster,
    needs memory for the whole network. The root is told explicitly: by default it would stay
    gathered after a forward without gradient and then compute with stale weights. `host`: the
    stored parameters and their gradients live in host memory, whence every block is gathered.
    """
    pinned = dims.device_type == "cuda"
    policy_of_place = CPUOffloadPolicy(pin_memory=pinned) if host else OffloadPolicy()
    gathered = None if is_rounded(net) else precision.compute
    policy = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=precision.reduce, cast_forward_inputs=False
    )
    for module in (*getattr(net, "blocks", ()), net):
        fully_shard(
            module,
            mesh=dims.fsdp_mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            offload_policy=policy_of_place,
        )


def reshard(net: nn.Module) -> None:
    """Drop gathered copies of parameters. Does nothing on a network without FSDP2."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
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
    root = next((module for module in net.modules() if isinstance(module, FSDPModule)), None)
    if root is not None:
        root.set_requires_gradient_sync(enabled)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard that this rank stores, sharing memory with `tensor`; a plain tensor is its own
    shard.
    """
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
