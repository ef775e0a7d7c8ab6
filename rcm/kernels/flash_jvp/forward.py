"""The portable Triton kernel: O, O_dot and LSE in one launch, any strides, lengths and head sizes
(derivation in README.md).

Shapes in comments: M query rows, J keys, D channels. FLAGS has a bit per tangent that exists: 1 for
q, 2 for k, 4 for v.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile_pointers(
    ptr, batch, head, row, stride_b, stride_l, stride_n, stride_d,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[L, D] pointers of a tile that starts at `row`; every product is 64 bit."""
    base = (
        ptr
        + batch.to(tl.int64) * stride_b
        + head.to(tl.int64) * stride_n
        + row.to(tl.int64) * stride_l
    )
    rows = tl.arange(0, BLOCK_L).to(tl.int64)
    channels = tl.arange(0, BLOCK_D).to(tl.int64)
    return base + rows[:, None] * stride_l + channels[None, :] * stride_d


@triton.jit
def _load_tile(
    tensor, batch, head, row, length,
    BLOCK_L: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """A [L, D] tile. Padding channels are zeros; with GUARD so are rows outside [0, length)."""
    ptr, stride_b, stride_l, stride_n, stride_d = tensor
    pointers = _tile_pointers(
        ptr, batch, head, row, stride_b, stride_l, stride_n, stride_d, BLOCK_L, BLOCK_D
    )
    rows = row + tl.arange(0, BLOCK_L)
    channels = tl.arange(0, BLOCK_D)
    if GUARD:
        inside = ((rows >= 0) & (rows < length))[:, None] & (channels < WIDTH)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if WIDTH != BLOCK_D:
        return tl.load(pointers, mask=(channels < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _seen(rows_table, q_rows, q_len, key):
    """Bool [M]: which rows see `key`, and with it the whole elementary interval that starts there;
    three intervals per row.
    """
    seen = q_rows < 0
    for interval in tl.static_range(3):
        low = tl.load(rows_table + q_rows * 6 + 2 * interval, mask=q_rows < q_len, other=0)
        high = tl.load(rows_table + q_rows * 6 + 2 * interval + 1, mask=q_rows < q_len, other=0)
        seen = seen | ((key >= low) & (key < high))
    return seen


@triton.jit
def _fold(
    state, queries, keys, bounds, where, tables, scales,
    FLAGS: tl.constexpr, EDGE: tl.constexpr, BLOCK_N: tl.constexpr, D_QK: tl.constexpr,
    BLOCK_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one run of key tiles into the running maximum, sums and accumulators of M rows."""
    acc_o, acc_t, m_i, l_i, r_i = state
    q, q_dot = queries
    k, kd, v, vd = keys
    start, count, stop = bounds
    batch, head, kv_len, tangent_start = where
    rows_table, q_rows, q_len = tables
    score_scale, tangent_scale = scales
    HAS_TQ: tl.constexpr = FLAGS & 1 != 0
    HAS_TK: tl.constexpr = FLAGS & 2 != 0
    HAS_TV: tl.constexpr = FLAGS & 4 != 0
    HAS_H: tl.constexpr = HAS_TQ or HAS_TK

    if EDGE == 2:
        seen = _seen(rows_table, q_rows, q_len, start)[:, None]
    for i in range(count):
        row = start + i * BLOCK_N
        k_tile = _load_tile(k, batch, head, row, kv_len, BLOCK_N, D_QK, BLOCK_QK, EDGE != 0)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if EDGE:
            cols = row + tl.arange(0, BLOCK_N)
            s = tl.where((cols < stop)[None, :], s, float("-inf"))
            if EDGE == 2:
                s = tl.where(seen, s, float("-inf"))
        if HAS_H:
            s_dot = tl.zeros(s.shape, tl.float32)
            if HAS_TQ:
                s_dot = tl.dot(q_dot, tl.trans(k_tile), s_dot, input_precision=PRECISION)
            if HAS_TK:
                kd_tile = _load_tile(
                    kd, batch, head, row - tangent_start, kv_len - tangent_start, BLOCK_N, D_QK,
                    BLOCK_QK, EDGE != 0,
                )  # fmt: skip
                s_dot = tl.dot(q, tl.trans(kd_tile), s_dot, input_precision=PRECISION)

        m_new = tl.maximum(m_i, tl.max(s, 1) * score_scale)
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(s * score_scale - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        v_tile = _load_tile(v, batch, head, row, kv_len, BLOCK_N, D_V, BLOCK_V, EDGE != 0)
        acc_o = tl.dot(
            p.to(v_tile.dtype), v_tile, acc_o * alpha[:, None], input_precision=PRECISION
        )
        if HAS_H or HAS_TV:
            acc_t = acc_t * alpha[:, None]
        if HAS_TV:
            vd_tile = _load_tile(
                vd, batch, head, row - tangent_start, kv_len - tangent_start, BLOCK_N, D_V, BLOCK_V,
                EDGE != 0,
            )  # fmt: skip
            acc_t = tl.dot(p.to(v_tile.dtype), vd_tile, acc_t, input_precision=PRECISION)
        if HAS_H:
            h = p * (s_dot * tangent_scale)
            r_i = r_i * alpha + tl.sum(h, 1)
            acc_t = tl.dot(h.to(v_tile.dtype), v_tile, acc_t, input_precision=PRECISION)
        else:
            r_i = r_i * alpha
    return acc_o, acc_t, m_i, l_i, r_i


@triton.jit(do_not_specialize=["num_tiles", "num_heads", "q_len", "kv_len", "tangent_start"])
def portable_forward(
    q, qd, k, kd, v, vd, o, od, lse, tiles, pieces, rows_table, num_tiles, num_heads, q_len, kv_len,
    tangent_start, score_scale, tangent_scale,
    FLAGS: tl.constexpr, CLASSES: tl.constexpr, EDGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D_QK: tl.constexpr, BLOCK_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head, query tile); programs of a head are neighbours, its longest
    tiles first.

    Tensors are (pointer, stride_b, stride_l, stride_n, stride_d). CLASSES has a bit per kind of key
    tile that the plan contains: 1 interior without tangent, 2 interior with tangent, 4 boundary.
    EDGE is 1 if all rows of a tile see the same keys, 2 if rows bring their own.
    """
    pid = tl.program_id(0)
    tile = tiles + 8 * (pid % num_tiles)
    head = (pid // num_tiles) % num_heads
    batch = pid // num_tiles // num_heads
    q_start = tl.load(tile)
    ANY: tl.constexpr = FLAGS != 0

    q_rows = q_start + tl.arange(0, BLOCK_M)
    q_tile = _load_tile(q, batch, head, q_start, q_len, BLOCK_M, D_QK, BLOCK_QK, True)
    qd_tile = q_tile
    if FLAGS & 1:
        qd_tile = _load_tile(qd, batch, head, q_start, q_len, BLOCK_M, D_QK, BLOCK_QK, True)
    acc_o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc_t = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m_i = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    r_i = tl.zeros([BLOCK_M], tl.float32)

    queries, keys = (q_tile, qd_tile), (k, kd, v, vd)
    where, tables = (batch, head, kv_len, tangent_start), (rows_table, q_rows, q_len)
    scales = (score_scale, tangent_scale)
    for kind in tl.static_range(3):
        if CLASSES & (1 << kind):
            for piece in range(tl.load(tile + 1 + kind), tl.load(tile + 2 + kind)):
                bounds = (
                    tl.load(pieces + 4 * piece),
                    tl.load(pieces + 4 * piece + 1),
                    tl.load(pieces + 4 * piece + 2),
                )
                acc_o, acc_t, m_i, l_i, r_i = _fold(
                    (acc_o, acc_t, m_i, l_i, r_i), queries, keys, bounds, where, tables, scales,
                    FLAGS & 1 if kind == 0 else FLAGS, EDGE if kind == 2 else 0, BLOCK_N, D_QK,
                    BLOCK_QK, D_V, BLOCK_V, PRECISION,
                )  # fmt: skip

    keep = (q_rows < q_len)[:, None] & (tl.arange(0, BLOCK_V) < D_V)[None, :]
    acc_o = acc_o / l_i[:, None]
    tl.store(
        _tile_pointers(o[0], batch, head, q_start, o[1], o[2], o[3], o[4], BLOCK_M, BLOCK_V),
        acc_o.to(o[0].dtype.element_ty),
        mask=keep,
    )
    if ANY:
        acc_t = acc_t / l_i[:, None] - (r_i / l_i)[:, None] * acc_o
        pointers = _tile_pointers(
            od[0], batch, head, q_start, od[1], od[2], od[3], od[4], BLOCK_M, BLOCK_V
        )
        tl.store(pointers, acc_t.to(od[0].dtype.element_ty), mask=keep)
    lse_row = lse + (batch.to(tl.int64) * num_heads + head) * q_len
    tl.store(lse_row + q_rows, (m_i + tl.log2(l_i)) * 0.6931471805599453, mask=q_rows < q_len)
