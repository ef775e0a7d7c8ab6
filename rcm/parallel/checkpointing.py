"""Activation checkpointing per block: recompute instead of store, without renaming a parameter and without touching forwards that store
nothing.

The policy replaces a block's `forward` attribute; modules, hooks and state-dict keys stay as they are. It steps aside (calls the block
directly) when gradients are disabled, which is where tangents are computed and where torch 2.11's checkpoint raises on duals, and in
cache-append forwards, which must run exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rcm.core.errors import ConfigError

MODES = ("none", "block_wise", "mm_only")
_MATMULS = ("mm", "addmm", "bmm", "baddbmm")
_ATTENTIONS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math",
)


def _saved_operators() -> frozenset[Any]:
    """Operators whose outputs mm_only keeps: matrix products and fused attention."""
    aten = torch.ops.aten
    return frozenset(getattr(aten, name).default for name in (*_MATMULS, *_ATTENTIONS) if hasattr(aten, name))


def _keep_products(saved: frozenset[Any], _ctx: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE


class Recompute:
    """A block's forward under non-reentrant checkpointing.

    `forward` is the block's own forward; `context_fn` selects what is stored (None: only the block's inputs).
    Called with the block's arguments; an argument whose `appends` attribute is true marks a cache-append forward.
    """

    def __init__(self, forward: Callable[..., Any], *, context_fn: Callable[[], Any] | None = None) -> None:
        self.forward = forward
        self.options = {} if context_fn is None else {"context_fn": context_fn}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, recomputing it in the backward pass where one will come."""
        appending = any(getattr(value, "appends", False) for value in (*args, *kwargs.values()))
        if appending or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **self.options, **kwargs)


def checkpoint_blocks(net: nn.Module, *, mode: str) -> None:
    """Apply the policy `mode` (net.sac_config.mode) to every block of `net`, in place.

    "none": store everything. "block_wise": store block inputs only. "mm_only": store outputs of matrix products and attention, recompute
    the cheap rest. Raises ConfigError for another mode.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown activation checkpointing mode {mode!r}; set net.sac_config.mode to one of {', '.join(MODES)}")
    if mode == "none":
        return
    context_fn = None
    if mode == "mm_only":
        context_fn = partial(create_selective_checkpoint_contexts, partial(_keep_products, _saved_operators()))
    for block in net.blocks:
        block.forward = Recompute(block.forward, context_fn=context_fn)
