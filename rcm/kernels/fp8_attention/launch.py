"""From tensors to kernel launches: outputs, descriptors, grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rcm.kernels import precompile
from rcm.kernels.fp8_attention import coding_kernels, portable
from rcm.kernels.fp8_attention.codes import E4M3, GROUP, CodedQueries, Codes, Scales
from rcm.kernels.fp8_attention.schedule import PortableTiles
from rcm.kernels.launching import device_of, power_of_2
from rcm.kernels.persistent_attention import launch as persistent
from rcm.kernels.persistent_attention.schedule import Tiles
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
            WIDTH=width, BLOCK_D=power_of_2(width), BLOCK_L=CODED_TOKENS, num_warps=4,
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
            AT_SLOTS=at_slots, WIDTH=width, BLOCK_D=power_of_2(width),
            BLOCK_L=CODED_TOKENS, num_warps=4,
        )  # fmt: skip


def attend_hopper(
    queries: CodedQueries, codes: Codes, *, count: int, dtype: torch.dtype, tiles: Tiles
) -> Tensor:
    """Attention to the first `count` tokens, [B, L, N, D], by the persistent kernel."""
    scales = queries.scale, codes.scales.value_scale, codes.scales.value_center
    return persistent.attend(
        queries.codes, codes.keys, codes.values, scales, count=count, dtype=dtype, tiles=tiles
    )


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
