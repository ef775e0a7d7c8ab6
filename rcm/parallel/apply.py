"""The one place where parallelism meets a network, in the one order that works.

1. activation checkpointing: innermost, it recomputes exactly what a block computes;
2. compile: one graph per block, the recomputation inside;
3. Ulysses: replaces modules inside blocks; its collectives stay out of the graphs;
4. FSDP2: outermost, its hooks gather a block's parameters before any of the above runs.
"""

from __future__ import annotations

import torch
from torch import nn

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.parallel.checkpointing import checkpoint_blocks
from rcm.parallel.fsdp import is_mixed, shard_parameters
from rcm.parallel.mesh import ParallelDims
from rcm.parallel.ulysses import shard_sequence


def is_frozen(net: nn.Module) -> bool:
    """Whether no parameter of `net` requires a gradient."""
    return not any(p.requires_grad for p in net.parameters())


def parallelize(
    net: nn.Module,
    *,
    dims: ParallelDims,
    precision: Precision,
    checkpoint: str = "none",
    compile: bool = False,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Apply activation checkpointing, compilation, Ulysses and FSDP2 to `net` in place, as `dims` and `precision` ask, and return it.

    `net` has `blocks`, `enter`, `leave`, `blocks[i].self_attn.core` and `config.num_heads`; it may be on the meta device (materialise it
    afterwards with rcm.parallel.init). State-dict keys do not change. A frozen network (no parameter requires a gradient) is stored in
    `precision.compute`; a trained one in `precision.params`. A single rank without mixed precision needs neither FSDP2 nor a process
    group. Raises ConfigError where cp does not divide the heads, the dims do not multiply to the world size, or a process group is
    missing.
    """
    dims.check(num_heads=net.config.num_heads)
    frozen = is_frozen(net)
    net.to(precision.compute if frozen else precision.params)
    if not frozen:
        checkpoint_blocks(net, mode=checkpoint)
    if compile:
        for block in net.blocks:
            block.forward = torch.compile(block.forward)
    if dims.cp > 1:
        shard_sequence(net, group=dims.cp_group)
        if compile:
            for block in net.blocks:
                block.self_attn.core.forward = torch.compiler.disable(block.self_attn.core.forward)
    if dims.world_size > 1 or (is_mixed(precision) and not frozen):
        if not torch.distributed.is_initialized() and dims.world_size == 1:
            raise ConfigError(
                f"parameters in {precision.params} computed in {precision.compute} on one rank need FSDP2 and so a process group of one; "
                "enter rcm.parallel.mesh.process_group(device_type) first, or choose one dtype"
            )
        shard_parameters(net, dims=dims, precision=precision, reshard_after_forward=reshard_after_forward)
    return net
