"""From tensors to kernel launches: outputs, descriptors, grids."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rcm.kernels import precompile
from rcm.kernels.fp8_attention import coding_kernels, merge_kernel, portable
from rcm.kernels.fp8_attention.codes import E4M3, GROUP, CodedQueries, Codes, Scales
from rcm.kernels.fp8_attention.schedule import PortableTiles, Tiles, make_plan
from rcm.kernels.launching import device_of
from rcm.kernels.split_attention.merge_kernel import merge

CODED_TOKENS = 32
"""Tokens of one head that a coding program takes."""


def code_queries(q: Tensor, scales: Scales, *, scale: float) -> CodedQueries:
    """`codes.code_queries_reference` in one kernel; `q` [B, L, N, D] with a unit last stride."""
    batch, length, heads, width = q.shape
    codes = torch.empty(batch, heads, length, width, dtype=E4M3, device=q.device)
    spread = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    with device_of(q):
        precompile.launch(
            coding_kernels.code_queries, (-(-length // CODED_TOKENS), heads, batch),
            q, scales.key_scale, codes, spread, length, heads, *q.stride()[:3],
            scale * math.log2(math.e),
            WIDTH=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_L=CODED_TOKENS, num_warps=4,
        )  # fmt: skip
    return CodedQueries(codes, spread)


def write(codes: Codes, slots: Tensor, k: Tensor, v: Tensor, *, at_slots: bool = False) -> None:
    """`codes.write_reference` in one kernel; unit last strides."""
    batch, _, heads, width = k.shape
    length = slots.shape[0]
    with device_of(k):
        precompile.launch(
            coding_kernels.code_pair, (2 * -(-length // CODED_TOKENS), heads, batch),
            k, v, slots, *codes.scales, codes.keys, codes.values,
            length, heads, codes.keys.shape[2] // GROUP, *k.stride()[:3], *v.stride()[:3],
            AT_SLOTS=at_slots, WIDTH=width, BLOCK_D=triton.next_power_of_2(width),
            BLOCK_L=CODED_TOKENS, num_warps=4,
        )  # fmt: skip


def attend_hopper(
    queries: CodedQueries, codes: Codes, *, count: int, dtype: torch.dtype, tiles: Tiles
) -> Tensor:
    """Attention to the first `count` tokens, [B, L, N, D]: the persistent kernel, and a merge of
    the query tiles that it cut.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as BulkDescriptor

    from rcm.kernels.fp8_attention.hopper import hopper_forward

    batch, heads, q_len, width = queries.codes.shape
    device = queries.codes.device
    programs = processors(precompile.device_for(queries.codes))
    plan = make_plan(q_len=q_len, kv_len=count, pairs=batch * heads, tiles=tiles, programs=programs)
    out = torch.empty(batch, q_len, heads, width, dtype=dtype, device=device)
    part_o = torch.empty(2 * programs, tiles.rows, width, dtype=dtype, device=device)
    part_lse = torch.empty(2 * programs, tiles.rows, dtype=torch.float32, device=device)

    def described(x: Tensor, box: list[int]) -> BulkDescriptor:
        layout = NVMMASharedLayout(swizzle_byte_width=min(128, box[3]), element_bitwidth=8, rank=4)
        return BulkDescriptor(x, list(x.shape), list(x.stride()), box, layout)

    consumer_registers, at_launch = tiles.registers
    with device_of(out):
        precompile.launch(
            hopper_forward, (programs,),
            described(queries.codes, [1, 1, 64, width]),
            described(codes.keys, [1, 1, tiles.block_n, width]),
            described(codes.values, [1, 1, width, tiles.block_n]),
            queries.scale, codes.scales.value_scale, codes.scales.value_center, out, part_o,
            part_lse,
            plan.whole, plan.remaining, plan.blocks, heads, plan.tiles_per_head, q_len, count,
            *out.stride()[:3],
            CONSUMERS=tiles.consumers, BLOCK_N=tiles.block_n, WIDTH=width, STAGES=tiles.stages,
            TWO_LEVEL=tiles.two_level, CONSUMER_REGISTERS=consumer_registers,
            num_warps=4, maxnreg=at_launch,
        )  # fmt: skip
        if plan.remaining:
            precompile.launch(
                merge_kernel.merge_parts, (plan.remaining, tiles.rows // 32),
                part_o, part_lse, out, plan.whole, plan.remaining, plan.blocks, programs, heads,
                plan.tiles_per_head, q_len,
                *out.stride()[:3], TILE=tiles.rows, ROWS=32, WIDTH=width, num_warps=4,
            )  # fmt: skip
    return out


def attend_portable(
    queries: CodedQueries,
    codes: Codes,
    *,
    count: int,
    dtype: torch.dtype,
    tiles: PortableTiles,
    parts: int,
) -> Tensor:
    """As `attend_hopper`, by the Triton kernel; `parts` along the keys, at most as many as there
    are key tiles, and six.
    """
    batch, heads, q_len, width = queries.codes.shape
    room = codes.keys.shape[2]
    blocks, tiles_per_head = -(-count // tiles.block_n), -(-q_len // tiles.block_m)
    parts = min(parts, blocks, 6)
    device = queries.codes.device
    out = torch.empty(parts, batch, q_len, heads, width, dtype=dtype, device=device)
    lse = torch.empty(parts, batch, heads, q_len, dtype=torch.float32, device=device)

    def described(x: Tensor, lines: int, width: int, box: list[int]) -> TensorDescriptor:
        return TensorDescriptor(x, [lines, width], [width, 1], box)

    with device_of(out):
        precompile.launch(
            portable.portable_forward, (tiles_per_head * batch * heads, parts),
            described(queries.codes, batch * heads * q_len, width, [tiles.block_m, width]),
            described(codes.keys, batch * heads * room, width, [tiles.block_n, width]),
            described(codes.values, batch * heads * width, room, [width, tiles.block_n]),
            queries.scale, codes.scales.value_scale, codes.scales.value_center, out, lse,
            parts, blocks, heads, tiles_per_head, q_len, count, room, *out.stride()[:4],
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, WIDTH=width, STAGES=tiles.stages,
            num_warps=tiles.num_warps,
        )  # fmt: skip
    return out[0] if parts == 1 else merge([o.transpose(1, 2) for o in out], list(lse))


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    return torch.cuda.get_device_properties(device).multi_processor_count
