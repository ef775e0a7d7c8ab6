"""Activation checkpointing per block: recompute instead of store, without renaming a parameter and
without touching forwards that store nothing.

The policy replaces a block's `forward` attribute; modules, hooks and state-dict keys stay as they
are. It steps aside (calls the block directly) when gradients are disabled, which is where tangents
are computed and where torch 2.11's checkpoint raises on duals, and in cache-append forwards, which
must run exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from rcm.core.errors import ConfigError
from rcm.core.records import Record
from rcm.kernels import replay
from rcm.nets.lora import Chosen
from rcm.parallel.blocks import blocks_of

Mode = Literal[
    "none", "mm_only", "block_wise_keep_attention_mlp", "block_wise_keep_attention", "block_wise"
]
MODES: tuple[Mode, ...] = get_args(Mode)
"""Ways to recompute, most memory first."""

KEEP_PRODUCTS = ("block_wise_keep_attention_mlp", "mm_only")
"""Modes that keep results of matrix products, which must be torch's own operators: compiled code
has none.
"""

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
_ATTENTIONS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math",
)


@dataclass(frozen=True)
class SACConfig(Record):
    """Activation checkpointing of one network."""

    # what a block keeps for its backward pass: everything, all matrix products and attentions, the
    # results of self-attention and of the MLP, that of self-attention, or nothing
    mode: Mode = "block_wise"
    # recompute blocks 0, n, 2n, ... alone; the blocks between them keep everything
    every_n_blocks: int = 1
    # as many of the last blocks keep everything, too; a backward pass begins with them
    keep_last_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.every_n_blocks <= 1024:
            raise ConfigError(
                f"every_n_blocks={self.every_n_blocks} must be in 1 to 1024; 1 is every block"
            )
        if not 0 <= self.keep_last_blocks <= 1024:
            raise ConfigError(f"keep_last_blocks={self.keep_last_blocks} must be in 0 to 1024")
        for name, idle in (("every_n_blocks", 1), ("keep_last_blocks", 0)):
            if self.mode == "none" and getattr(self, name) != idle:
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect while mode=none recomputes no"
                    f" block; choose another mode, or leave it at {idle}"
                )


def _operators(*names: str) -> frozenset[Any]:
    """Operators of torch whose outputs are kept."""
    return frozenset(
        getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)
    )


def _policy(
    saved: frozenset[Any], _ctx: Any, operator: Any, *_args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE
        if operator in saved and replay.is_keeping()
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


def _contexts(saved: frozenset[Any]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a block's forward and of its recomputation that keep the operators `saved` and
    kernels behind `replay.kept`.
    """
    forward, recomputation = create_selective_checkpoint_contexts(partial(_policy, saved))
    tape = replay.Tape()
    return _Both(tape.recording, forward), _Both(tape.replaying, recomputation)


class _Both(AbstractContextManager):
    """Two contexts as one that can be entered again: in a second backward pass theirs is the word
    on why it is refused.
    """

    def __init__(
        self, outer: Callable[[], AbstractContextManager], inner: AbstractContextManager
    ) -> None:
        self._outer, self._inner = outer, inner
        self._entered = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._outer())
            stack.enter_context(self._inner)
            self._entered = stack.pop_all()

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.__exit__(*error)


class _Keeping:
    """A forward whose attention results, or products too, are kept; used inside recomputed
    blocks.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with replay.keeping():
            return self.forward(*args, **kwargs)


class _WithAdapters:
    """A forward with the low-rank adapters of this moment whenever it runs: before a block is
    recomputed, other roles have computed.
    """

    def __init__(self, forward: Callable[..., Any], chosen: Chosen) -> None:
        self.forward, self.chosen, self.name = forward, chosen, chosen.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.chosen.using(self.name):
            return self.forward(*args, **kwargs)


class Recompute:
    """A block's forward under non-reentrant checkpointing.

    `forward` is the block's own forward; `context_fn` selects what is stored (None: only the
    block's inputs); `chosen` says with which low-rank adapters the network computes, at that moment
    and in the recomputation (None: it has none). Called with the block's arguments; an argument
    whose `appends` attribute is true marks a cache-append forward.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        *,
        context_fn: Callable[[], Any] | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        self.forward, self.chosen = forward, chosen
        self.options: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, recomputing it in the backward pass where one will come."""
        appending = any(getattr(value, "appends", False) for value in (*args, *kwargs.values()))
        if appending or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        forward = self.forward if self.chosen is None else _WithAdapters(self.forward, self.chosen)
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **self.options, **kwargs
        )


def checkpoint_blocks(net: nn.Module, *, mode: str, every: int = 1, keep_last: int = 0) -> None:
    """Apply the policy `mode` (net.sac_config.mode) to blocks 0, `every`, 2 `every`, ... of `net`
    (net.sac_config.every_n_blocks), in place. The blocks between them store everything, and so do
    the last `keep_last` (net.sac_config.keep_last_blocks): what the very last one stores is what
    its recomputation would have made at the same moment.

    "none": store everything. "block_wise": store block inputs only. "block_wise_keep_attention":
    also the result of each block's self-attention (E values per token and block), so that the
    dearest kernel is not run again. "block_wise_keep_attention_mlp": also the MLP's (as many),
    whose second product is the dearest per value kept. "mm_only": store outputs of matrix products
    and attention, recompute the cheap rest. Attention is kept if it is one of torch's fused
    operators or a kernel of this package; other back ends are recomputed. Raises ConfigError for
    another mode, and for `every` below 1.
    """
    if mode not in MODES:
        raise ConfigError(
            f"unknown activation checkpointing mode {mode!r}; set net.sac_config.mode to one of"
            f" {', '.join(MODES)}"
        )
    if every < 1:
        raise ConfigError(
            f"net.sac_config.every_n_blocks={every} must be at least 1, which recomputes every"
            " block"
        )
    if mode == "none":
        return
    context_fn = None
    if mode == "block_wise_keep_attention":
        context_fn = partial(_contexts, _operators(*_ATTENTIONS))
    elif mode in KEEP_PRODUCTS:
        context_fn = partial(_contexts, _operators(*_MATMULS, *_ATTENTIONS))
    blocks = blocks_of(net)
    for block in blocks[: max(0, len(blocks) - keep_last) : every]:
        forward = _Keeping(block.forward) if mode == "mm_only" else block.forward
        block.forward = Recompute(
            forward, context_fn=context_fn, chosen=getattr(net, "chosen", None)
        )
        if mode.startswith("block_wise_keep_attention"):
            block.self_attn.core.forward = _Keeping(block.self_attn.core.forward)
        if mode == "block_wise_keep_attention_mlp":
            block.ffn[2].forward = _Keeping(block.ffn[2].forward)
