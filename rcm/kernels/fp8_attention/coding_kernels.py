"""Triton kernels that code queries, and keys and values into their slots; the format is in `codes`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "heads"])
def code_queries(
    q_ptr, key_scale, codes_ptr, scale_ptr, length, heads, stride_b, stride_l, stride_n, scale,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """`BLOCK_L` queries of one head; `scale` is that of the scores, to the base 2."""
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None] & (column < WIDTH)[None, :]
    base = q_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n
    q = tl.load(base + row.to(tl.int64)[:, None] * stride_l + column[None, :], mask=inside, other=0.0).to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(q), axis=1), 1e-12)
    line = (batch.to(tl.int64) * heads + head) * length + row
    coded = q * (448.0 / top)[:, None]
    tl.store(codes_ptr + line[:, None] * WIDTH + column[None, :], coded.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + line, top * (tl.load(key_scale + head) * (scale / 448.0)), mask=row < length)


@triton.jit
def _coded(x, center, spread):
    return tl.minimum(tl.maximum((x.to(tl.float32) - center[None, :]) / spread, -448.0), 448.0)


@triton.jit(do_not_specialize=["length", "heads", "room"])
def code_pair(
    k_ptr, v_ptr, slots_ptr, key_scale, key_center, value_scale, value_center, keys_ptr, values_ptr,
    length, heads, room, k_b, k_l, k_n, v_b, v_l, v_n,
    AT_SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """`BLOCK_L` tokens of one head to their slots: a key to its row, a value to its column. AT_SLOTS: they are read there, too."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    known = column < WIDTH
    inside = (token < length)[:, None] & known[None, :]
    slot = tl.load(slots_ptr + token, mask=token < length, other=0)
    row = (slot & ~15) + ((slot & 2) << 2) + ((slot & 12) >> 1) + (slot & 1)
    source = (slot if AT_SLOTS else token).to(tl.int64)[:, None]
    pair = batch * heads + head

    x = tl.load(k_ptr + batch * k_b + head * k_n + source * k_l + column[None, :], mask=inside, other=0.0)
    center = tl.load(key_center + head * WIDTH + column, mask=known, other=0.0)
    code = _coded(x, center, tl.load(key_scale + head)).to(keys_ptr.dtype.element_ty)
    tl.store(keys_ptr + (pair * room + row.to(tl.int64))[:, None] * WIDTH + column[None, :], code, mask=inside)

    x = tl.load(v_ptr + batch * v_b + head * v_n + source * v_l + column[None, :], mask=inside, other=0.0)
    center = tl.load(value_center + head * WIDTH + column, mask=known, other=0.0)
    spread = tl.load(value_scale + head * WIDTH + column, mask=known, other=1.0)
    code = tl.trans(_coded(x, center, spread[None, :])).to(values_ptr.dtype.element_ty)
    lines = (pair * WIDTH + column.to(tl.int64))[:, None] * room + slot.to(tl.int64)[None, :]
    tl.store(values_ptr + lines, code, mask=known[:, None] & (token < length)[None, :])
