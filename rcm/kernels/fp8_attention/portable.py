"""The Triton kernel of FP8 attention: one program per query tile and part of the keys. For
comparison, and for the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

TOP = tl.constexpr(8.0)


@triton.jit
def _fold(
    state, q, scale, k_desc, v_desc, pair, room, block, kv_len,
    MASK: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running maximum, sum and accumulator."""
    floor, total, acc = state
    k = k_desc.load([pair * room + block * BLOCK_N, 0])
    s = tl.dot(q, tl.trans(k))
    if MASK:
        column = tl.arange(0, BLOCK_N)
        key = (
            block * BLOCK_N
            + (column & ~15)
            + ((column & 6) << 1)
            + ((column & 8) >> 2)
            + (column & 1)
        )
        s = tl.where((key < kv_len)[None, :], s, float("-inf"))
    raised = tl.maximum(floor, tl.max(s, axis=1) * scale - TOP)
    change = tl.exp2(floor - raised)
    p = tl.exp2(s * scale[:, None] - raised[:, None])
    total = total * change + tl.sum(p, axis=1)
    p = tl.reshape(
        tl.permute(tl.reshape(p, [p.shape[0], BLOCK_N // 16, 2, 4, 2]), (0, 1, 3, 2, 4)),
        [p.shape[0], BLOCK_N],
    )
    v = v_desc.load([pair * WIDTH, block * BLOCK_N])
    acc = acc * change[:, None] + tl.dot(p.to(q.dtype), tl.trans(v))
    return raised, total, acc


@triton.jit(
    do_not_specialize=["parts", "blocks", "heads", "tiles_per_head", "q_len", "kv_len", "room"]
)
def portable_forward(
    q_desc, k_desc, v_desc, row_scale, value_scale, value_center, o_ptr, lse_ptr,
    parts, blocks, heads, tiles_per_head, q_len, kv_len, room, stride_p, stride_b, stride_l,
    stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles of all heads, parts). Results [parts, B, L, N, D], natural log-sum-exps
    [parts, B, N, L].
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    pair = tile // tiles_per_head
    start = (tile % tiles_per_head) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    low, high = part * blocks // parts, (part + 1) * blocks // parts
    q = q_desc.load([pair * q_len + start, 0])
    scale = tl.load(row_scale + pair * q_len + row, mask=row < q_len, other=1.0)
    floor = tl.full([BLOCK_M], -1.0e30, tl.float32)
    state = floor, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, WIDTH], tl.float32)
    # the tile with the last keys is the one with columns to be masked
    state = _fold(
        state, q, scale, k_desc, v_desc, pair, room, high - 1, kv_len, True, BLOCK_N, WIDTH
    )
    for block in tl.range(low, high - 1, num_stages=STAGES):
        state = _fold(
            state, q, scale, k_desc, v_desc, pair, room, block, kv_len, False, BLOCK_N, WIDTH
        )
    floor, total, acc = state
    channel = tl.arange(0, WIDTH)
    head, batch = pair % heads, pair // heads
    spread = tl.load(value_scale + head * WIDTH + channel)
    center = tl.load(value_center + head * WIDTH + channel)
    result = acc / total[:, None] * spread[None, :] + center[None, :]
    base = (
        o_ptr
        + part.to(tl.int64) * stride_p
        + batch.to(tl.int64) * stride_b
        + head.to(tl.int64) * stride_n
    )
    keep = row < q_len
    tl.store(
        base + row.to(tl.int64)[:, None] * stride_l + channel[None, :],
        result.to(o_ptr.dtype.element_ty),
        mask=keep[:, None],
    )
    lse = (floor + tl.log2(total)) * 0.6931471805599453
    count = tl.num_programs(0) // tiles_per_head
    tl.store(lse_ptr + (part * count + pair).to(tl.int64) * q_len + row, lse, mask=keep)
