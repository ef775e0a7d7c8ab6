"""The one place where parallelism meets a network, in the one order that works.

1. compile: the code of a block before and after its self-attention, one graph each for all blocks;
2. activation checkpointing around it: a compiler that finds the checkpoint inside compiles nothing;
3. Ulysses: replaces modules inside blocks; the core of the self-attention, collectives included,
   stays out of the graphs;
4. FSDP2: outermost, its hooks gather a block's parameters before any of the above runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.frozen_fp8 import FrozenWeights, round_linears_
from rcm.nets.trained_fp8 import LinearPrecision, train_in_fp8_
from rcm.parallel.blocks import blocks_of
from rcm.parallel.checkpointing import KEEP_PRODUCTS, Mode, SACConfig, checkpoint_blocks
from rcm.parallel.fsdp import is_mixed, shard_parameters
from rcm.parallel.mesh import ParallelDims
from rcm.parallel.ulysses import Average, shard_sequence

_VARIANTS = 64
"""Compiled variants of a block's code, shared by all networks of a process: kinds of pass, shapes,
with and without gradient. Behind its limit, by default 8, torch runs the rest uncompiled and only
warns.
"""


def is_frozen(net: nn.Module) -> bool:
    """Whether no parameter of `net` requires a gradient."""
    return not any(p.requires_grad for p in net.parameters())


def parallelize(
    net: nn.Module,
    *,
    dims: ParallelDims,
    precision: Precision,
    checkpoint: Mode | SACConfig = "none",
    compile: bool = False,
    frozen_weights: FrozenWeights = "compute",
    linear_precision: LinearPrecision = "compute",
    host: bool = False,
) -> nn.Module:
    """Apply activation checkpointing, compilation, Ulysses and FSDP2 to `net` in place, as `dims`
    and `precision` ask, and return it.

    `net` has `blocks`, `enter`, `leave`, `blocks[i].self_attn.core` and `config.num_heads`; it may
    be on the meta device (materialise it afterwards with rcm.parallel.init). State-dict keys do not
    change. Frozen parameters (those of a teacher, or below low-rank adapters) are stored in
    `precision.compute`, or `frozen_weights` says how (`rcm.nets.frozen_fp8`), trained ones in
    `precision.params`; `linear_precision` says how those compute (`rcm.nets.trained_fp8`). A single
    rank without mixed precision needs neither FSDP2 nor a process group. `host`: stored parameters
    and gradients live in host memory (`shard_parameters`); materialise the network there.
    `checkpoint` is a mode of `checkpoint_blocks` or all its settings. Raises ConfigError where cp
    does not divide the heads, the dims do not multiply to the world size, a process group is
    missing, or `checkpoint` and `compile` exclude each other.
    """
    recompute = SACConfig(checkpoint) if isinstance(checkpoint, str) else checkpoint
    config: Any = net.config
    dims.check(num_heads=config.num_heads)
    frozen = is_frozen(net)
    for parameter in net.parameters():
        parameter.data = parameter.data.to(
            precision.params if parameter.requires_grad else precision.compute
        )
    round_linears_(net, frozen_weights)
    train_in_fp8_(net, linear_precision)
    if compile:
        _compile_blocks(net, mode="none" if frozen else recompute.mode)
    if not frozen:
        checkpoint_blocks(
            net,
            mode=recompute.mode,
            every=recompute.every_n_blocks,
            keep_last=recompute.keep_last_blocks,
        )
    if dims.cp > 1:
        shard_sequence(net, group=dims.cp_group)
    if compile:
        # masks, caches and launches of the attention are not the compiler's business
        for block in blocks_of(net):
            block.self_attn.core.forward = torch.compiler.disable(block.self_attn.core.forward)
    if host or dims.world_size > 1 or (is_mixed(precision) and not frozen):
        if not torch.distributed.is_initialized() and dims.world_size == 1:
            raise ConfigError(
                f"parameters in {precision.params} computed in {precision.compute} on one rank need"
                " FSDP2 and so a process group of one; enter"
                " rcm.parallel.mesh.process_group(device_type) first, or choose one dtype"
            )
        shard_parameters(
            net,
            dims=dims,
            precision=precision,
            host=host,
        )
    return net


def parallelize_head(head: nn.Module, *, dims: ParallelDims, precision: Precision) -> nn.Module:
    """`parallelize` for a trained head that reads the tokens of a network parallelised alike: its
    seam `pool` averages over the ranks that share a sequence. In place.
    """
    for parameter in head.parameters():
        parameter.data = parameter.data.to(precision.params)
    if dims.cp > 1:
        head.pool = Average(dims.cp_group)
    if dims.world_size > 1 or is_mixed(precision):
        shard_parameters(head, dims=dims, precision=precision)
    return head


def _compile_blocks(net: nn.Module, *, mode: str) -> None:
    if mode in KEEP_PRODUCTS:
        raise ConfigError(
            f"net.sac_config.mode={mode} keeps single operators, which are out of sight inside"
            " compiled code; with compile=true choose block_wise, block_wise_keep_attention or"
            " none"
        )
    import torch._dynamo.config as compiler  # takes two seconds, so not with this module

    compiler.recompile_limit = max(compiler.recompile_limit, _VARIANTS)
    for block in blocks_of(net):
        block.forward = torch.compile(block.forward)
