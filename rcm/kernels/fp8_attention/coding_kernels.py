"""Triton kernels that code queries, and keys and values into their slots; the format is in
`codes`.
"""

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
    q = tl.load(
        base + row.to(tl.int64)[:, None] * stride_l + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(q), axis=1), 1e-12)
    line = (batch.to(tl.int64) * heads + head) * length + row
    coded = q * (448.0 / top)[:, None]
    tl.store(
        codes_ptr + line[:, None] * WIDTH + column[None, :],
        coded.to(codes_ptr.dtype.element_ty),
        mask=inside,
    )
    tl.store(
        scale_ptr + line, top * (tl.load(key_scale + head) * (scale / 448.0)), mask=row < length
    )


@triton.jit
def _codes_at(x_ptr, place, center_ptr, spread, inside, column, WIDTH: tl.constexpr):
    """Codes [L, D], still in float32, of what lies at `place` [L, 1]."""
    x = tl.load(x_ptr + place + column[None, :], mask=inside, other=0.0).to(tl.float32)
    center = tl.load(center_ptr + column, mask=column < WIDTH, other=0.0)
    return tl.minimum(tl.maximum((x - center[None, :]) / spread, -448.0), 448.0)


@triton.jit(do_not_specialize=["length", "heads", "groups"])
def code_pair(
    k_ptr, v_ptr, slots_ptr, key_scale, key_center, value_scale, value_center, keys_ptr, values_ptr,
    length, heads, groups, k_b, k_l, k_n, v_b, v_l, v_n,
    AT_SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """`BLOCK_L` tokens of one head to their slots, of 16 `groups`: every other program keys, each
    to its row, the others values, each to its column. AT_SLOTS: they are read there, too.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) // 2 * BLOCK_L
    token = start + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    known = column < WIDTH
    inside = (token < length)[:, None] & known[None, :]
    slot = tl.load(slots_ptr + token, mask=token < length, other=0).to(tl.int32)
    source = (slot if AT_SLOTS else token).to(tl.int64)[:, None]
    pair = batch * heads + head
    room = groups * 16
    if tl.program_id(0) % 2 == 0:
        scale = tl.load(key_scale + head)
        key = _codes_at(
            k_ptr, batch * k_b + head * k_n + source * k_l, key_center + head * WIDTH, scale,
            inside, column, WIDTH,
        )  # fmt: skip
        row = (slot & ~15) + ((slot & 2) << 2) + ((slot & 12) >> 1) + (slot & 1)
        tl.store(
            keys_ptr + pair * room * WIDTH + (row[:, None] * WIDTH + column[None, :]),
            key.to(keys_ptr.dtype.element_ty),
            mask=inside,
        )
    else:
        spread = tl.load(value_scale + head * WIDTH + column, mask=known, other=1.0)[None, :]
        value = _codes_at(
            v_ptr, batch * v_b + head * v_n + source * v_l, value_center + head * WIDTH, spread,
            inside, column, WIDTH,
        )  # fmt: skip
        turned = tl.trans(value.to(values_ptr.dtype.element_ty))
        base, lines = values_ptr + pair * room * WIDTH, column[:, None] * room
        first = tl.load(slots_ptr + start).to(tl.int32)
        last = tl.load(slots_ptr + tl.minimum(start + BLOCK_L, length) - 1).to(tl.int32)
        if (start + BLOCK_L <= length) & (last - first == BLOCK_L - 1) & (first % 8 == 0):
            # a run: eight codes at once, where slots one by one would touch a sector of memory for
            # every byte
            run = tl.multiple_of(first, 8) + tl.arange(0, BLOCK_L)
            tl.store(base + (lines + run[None, :]), turned, mask=known[:, None])
        else:
            tl.store(
                base + (lines + slot[None, :]),
                turned,
                mask=known[:, None] & (token < length)[None, :],
            )
