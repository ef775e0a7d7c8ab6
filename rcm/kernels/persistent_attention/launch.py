"""From tensors to the launches of the persistent kernel and of the merge behind it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rcm.kernels import precompile
from rcm.kernels.launching import device_of
from rcm.kernels.persistent_attention import merge_kernel
from rcm.kernels.persistent_attention.hopper import hopper_forward
from rcm.kernels.persistent_attention.schedule import CONSUMER_ROWS, Tiles, make_plan

MERGED_ROWS = 32
"""Query rows that a merging program takes."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor | float, Tensor | None, Tensor | None],
    *,
    count: int,
    dtype: torch.dtype,
    tiles: Tiles,
) -> Tensor:
    """Attention of `q` [B, N, L, D] to the first `count` of `k` [B, N, S, D] and `v`, [B, L, N, D]
    in `dtype`: the persistent kernel, and a merge of the query tiles that it cut.

    In 16 bits `v` is [B, N, S, D] and `scales` are (base-2 exponent per score, None, None). In e4m3
    `v` is [B, N, D, S] and `scales` are those of query rows, of values and their centers. Last
    strides are 1, others multiples of 16 bytes.
    """
    batch, heads, q_len, width = q.shape
    programs = processors(precompile.device_for(q))
    plan = make_plan(q_len=q_len, kv_len=count, pairs=batch * heads, tiles=tiles, programs=programs)
    out = torch.empty(batch, q_len, heads, width, dtype=dtype, device=q.device)
    part_o = torch.empty(2 * programs, tiles.rows, width, dtype=dtype, device=q.device)
    part_lse = torch.empty(2 * programs, tiles.rows, dtype=torch.float32, device=q.device)
    keys, coded = [1, 1, tiles.block_n, width], q.element_size() == 1
    consumer_registers, at_launch = tiles.registers
    with device_of(out):
        precompile.launch(
            hopper_forward, (programs,),
            _described(q, [1, 1, CONSUMER_ROWS, width]), _described(k, keys),
            _described(v, [1, 1, width, tiles.block_n] if coded else keys),
            *scales, out, part_o, part_lse,
            plan.whole, plan.remaining, plan.blocks, plan.sharers, heads, plan.tiles_per_head,
            q_len, count, *out.stride()[:3],
            CONSUMERS=tiles.consumers, BLOCK_N=tiles.block_n, WIDTH=width, STAGES=tiles.stages,
            TWO_LEVEL=tiles.two_level, CONSUMER_REGISTERS=consumer_registers,
            num_warps=4, maxnreg=at_launch,
        )  # fmt: skip
        if plan.remaining:
            precompile.launch(
                merge_kernel.merge_parts, (plan.remaining, tiles.rows // MERGED_ROWS),
                part_o, part_lse, out, plan.whole * programs, plan.remaining, plan.blocks,
                plan.sharers, heads, plan.tiles_per_head, q_len,
                *out.stride()[:3], TILE=tiles.rows, ROWS=MERGED_ROWS, WIDTH=width, num_warps=4,
            )  # fmt: skip
    return out


def _described(x: Tensor, box: list[int]) -> TensorDescriptor:
    bits = 8 * x.element_size()
    layout = NVMMASharedLayout(
        swizzle_byte_width=min(128, box[3] * bits // 8), element_bitwidth=bits, rank=4
    )
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    return torch.cuda.get_device_properties(device).multi_processor_count
