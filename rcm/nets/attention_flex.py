"""Attention through torch's FlexAttention: block tables from masks, one kernel, no autotuning."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rcm.core.dual import in_dual_level
from rcm.core.errors import ConfigError
from rcm.kernels.masks import MaskSpec
from rcm.nets.attention_dense import wants_gradient
from rcm.nets.attention_packages import FLASH4_HINT, failed, require_package

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FlexKernel = Literal["auto", "triton", "flash"]
BLOCK = 128
"""Edge of a block of the block tables, in tokens."""
_OPTIONS = {"auto": {}, "triton": {"BACKEND": "TRITON"}, "flash": {"BACKEND": "FLASH"}}


class Flex:
    """FlexAttention by torch's choice ("auto"), its Triton kernel, or FlashAttention-4 ("flash").

    Compiled once per shape without autotuning, seconds instead of minutes. The mask comes as block
    tables made from its intervals, and as three key intervals per query for blocks at an edge, so
    another mask of the same lengths compiles nothing. On the CPU torch has the forward pass only.
    Raises `ConfigError` for "flash" without FlashAttention-4 and for a gradient on the CPU,
    `RuntimeError` inside a tangent pass, where compiled code is switched off.
    """

    def __init__(self, kernel: FlexKernel = "auto") -> None:
        if kernel not in _OPTIONS:
            raise ConfigError(
                f"unknown kernel {kernel!r} for FlexAttention; set flex_backend / RCM_FLEX_BACKEND"
                " to auto, triton or flash"
            )
        if kernel == "flash":
            require_package("flex_flash", "flash_attn.cute", hint=FLASH4_HINT)
        self.kernel = kernel
        self.name = "flex" if kernel == "auto" else f"flex_{kernel}"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        if not q.is_cuda and wants_gradient(q, k, v):
            raise ConfigError(
                f"attention backend '{self.name}' has no gradient on {q.device.type}: torch's"
                " FlexAttention computes only the forward pass there; choose attention_backend /"
                " RCM_ATTENTION_BACKEND from auto, sdpa, reference"
            )
        if in_dual_level():
            raise RuntimeError(
                f"attention backend '{self.name}' cannot run inside a tangent pass, where compiled"
                " code is switched off and FlexAttention would hold the whole score matrix; choose"
                " attention_backend / RCM_ATTENTION_BACKEND from auto, sdpa, triton"
            )
        blocks = None if mask is None or mask.is_full else block_mask(mask, q.device)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        options = {"scale": scale, "kernel_options": _OPTIONS[self.kernel]}
        try:
            return _compiled()(*heads_first, block_mask=blocks, **options).transpose(1, 2)
        except Exception as error:
            told = failed(self.name, "flash_attn.cute", q, k, error)
            if self.kernel != "flash" or told is error:
                raise
            raise told from error


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    import torch._dynamo.config as compiler  # takes two seconds, so not with this module
    from torch.nn.attention.flex_attention import flex_attention

    # behind it torch would run uncompiled, with a whole score matrix
    compiler.recompile_limit = max(compiler.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)


# more than the chunks of a rollout: what recomputation needs again must still be there
@lru_cache(maxsize=64)
def block_mask(mask: MaskSpec, device: torch.device) -> BlockMask:
    """FlexAttention's form of `mask`: needed and full key blocks per query block, and a rule.

    Made from `kv_intervals` and `row_segments`; nothing quadratic in tokens is built.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # the tables may outlive the mode they were first asked for in
    with torch.inference_mode(False):
        tiles, columns = mask.kv_intervals(BLOCK), -(-mask.kv_len // BLOCK)
        needed, full = (torch.zeros(len(tiles), columns, dtype=torch.bool) for _ in range(2))
        for row, tile in enumerate(tiles):
            for start, stop in tile.union:
                needed[row, start // BLOCK : -(-stop // BLOCK)] = True
            for start, stop in tile.common:
                full[row, -(-start // BLOCK) : stop // BLOCK] = True
        if tiles[-1].q_stop - tiles[-1].q_start < BLOCK:
            full[-1] = False  # a block with rows that do not exist is an edge
        partial_count, partial_index = _ordered(needed & ~full, device)
        full_count, full_index = _ordered(full, device)
        # vectors, not one table: torch 2.11 makes no code for FlashAttention-4 of a constant index
        bounds = [bound.to(device) for bound in _bounds(mask)]

        def allowed(_batch: Tensor, _head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            start, stop, start_2, stop_2, start_3, stop_3 = (bound[q_index] for bound in bounds)
            seen = (kv_index >= start) & (kv_index < stop)
            seen = seen | ((kv_index >= start_2) & (kv_index < stop_2))
            return seen | ((kv_index >= start_3) & (kv_index < stop_3))

        return BlockMask.from_kv_blocks(
            partial_count,
            partial_index,
            full_count,
            full_index,
            BLOCK_SIZE=BLOCK,
            mask_mod=allowed,
            seq_lengths=(mask.q_len, mask.kv_len),
        )


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """True blocks per row, their columns first: int32 `[1, 1, rows]`, `[1, 1, rows, columns]`."""
    counts = blocks.sum(dim=1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].to(device), order[None, None].contiguous().to(device)


def _bounds(mask: MaskSpec) -> list[Tensor]:
    """Up to three key intervals of every query, as start, stop, start, ... in vectors int32
    `[q_len]`; unused intervals are empty.
    """
    table = torch.zeros(mask.q_len, 3, 2, dtype=torch.int32)
    for segment in mask.row_segments():
        table[segment.q_start : segment.q_stop, : len(segment.intervals)] = torch.tensor(
            segment.intervals, dtype=torch.int32
        )
    return [column.contiguous() for column in table.flatten(1).unbind(1)]
