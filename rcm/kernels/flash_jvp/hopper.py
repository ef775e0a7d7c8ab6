"""The Hopper kernel: O, O_dot and LSE with bulk copies, a producer warp and two independent
consumer warpgroups (derivation in README.md).

One program owns 128 query rows of one head, 64 for each consumer. The producer warp streams key
tiles through a ring of shared-memory slots, K with its tangent and V with its tangent on separate
barriers. A consumer issues its products asynchronously so that softmax arithmetic runs under them:
exp(S) under the two products of S_dot, H under the products of V. Shapes in comments: M rows, J
keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)
"""Query rows of one consumer warpgroup: the height of a warpgroup product."""


@gluon.jit
def _flat(tile, ROWS_OF_TILE: gl.constexpr, WIDTH: gl.constexpr):
    """The [1, rows, 1, width] shared tile of a bulk copy as the matrix that a product reads."""
    return tile.reshape([ROWS_OF_TILE, WIDTH])


@gluon.jit
def _load_slot(
    desc, dot_desc, ring, dot_ring, full, empty, it, batch, head, row, tangent_row,
    HAS_DOT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill one ring slot with a tile and, if wanted, its tangent. Rows outside the tensors arrive
    as zeros.
    """
    slot = it % STAGES
    mbarrier.wait(empty.index(slot), ((it // STAGES) & 1) ^ 1)
    nbytes: gl.constexpr = desc.block_type.nbytes
    if HAS_DOT:
        mbarrier.expect(full.index(slot), 2 * nbytes)
        tma.async_copy_global_to_shared(
            dot_desc, [batch, tangent_row, head, 0], full.index(slot), dot_ring.index(slot)
        )
    else:
        mbarrier.expect(full.index(slot), nbytes)
    tma.async_copy_global_to_shared(desc, [batch, row, head, 0], full.index(slot), ring.index(slot))


@gluon.jit
def _produce(
    descs, rings, bars, plan, where,
    FLAGS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: query tiles once, then every key tile of the plan in the consumers'
    order.
    """
    q_desc, qd_desc, k_desc, kd_desc, v_desc, vd_desc = descs
    q_buf, qd_buf, k_ring, kd_ring, v_ring, vd_ring = rings
    q_full, k_full, k_empty, v_full, v_empty = bars
    pieces, tile = plan
    batch, head, q_start, tangent_start = where
    HAS_TQ: gl.constexpr = FLAGS & 1 != 0
    HAS_TK: gl.constexpr = FLAGS & 2 != 0
    HAS_TV: gl.constexpr = FLAGS & 4 != 0

    q_bytes: gl.constexpr = q_desc.block_type.nbytes * (2 if HAS_TQ else 1)
    for half in gl.static_range(2):
        mbarrier.expect(q_full.index(half), q_bytes)
        tma.async_copy_global_to_shared(
            q_desc, [batch, q_start + half * ROWS, head, 0], q_full.index(half), q_buf.index(half)
        )
        if HAS_TQ:
            tma.async_copy_global_to_shared(
                qd_desc,
                [batch, q_start + half * ROWS, head, 0],
                q_full.index(half),
                qd_buf.index(half),
            )

    it = 0
    for kind in gl.static_range(2):
        # the first kind of pieces has no key tangents, the other two have them
        for piece in range(gl.load(tile + 1 + kind), gl.load(tile + 2 + 2 * kind)):
            row = gl.load(pieces + 4 * piece)
            for _ in range(gl.load(pieces + 4 * piece + 1)):
                dot_row = row - tangent_start
                _load_slot(
                    k_desc, kd_desc, k_ring, kd_ring, k_full, k_empty, it, batch, head, row,
                    dot_row, HAS_TK and kind == 1, STAGES,
                )  # fmt: skip
                _load_slot(
                    v_desc, vd_desc, v_ring, vd_ring, v_full, v_empty, it, batch, head, row,
                    dot_row, HAS_TV and kind == 1, STAGES,
                )  # fmt: skip
                row += BLOCK_N
                it += 1


@gluon.jit
def _seen(rows_table, q_rows, q_len, key):
    """Bool [M]: which rows see `key`, and with it the whole elementary interval that starts there;
    three intervals per row.
    """
    seen = q_rows < 0
    for interval in gl.static_range(3):
        low = gl.load(rows_table + q_rows * 6 + 2 * interval, mask=q_rows < q_len, other=0)
        high = gl.load(rows_table + q_rows * 6 + 2 * interval + 1, mask=q_rows < q_len, other=0)
        seen = seen | ((key >= low) & (key < high))
    return seen


@gluon.jit
def _consume_piece(
    state, queries, rings, bars, bounds, tables, scales, it,
    FLAGS: gl.constexpr, EDGE: gl.constexpr, BLOCK_N: gl.constexpr, D_QK: gl.constexpr,
    D_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fold one run of key tiles into the running maximum, sums and accumulators of 64 rows."""
    acc_o, acc_t, m_i, l_i, r_i = state
    q, q_dot = queries
    k_ring, kd_ring, v_ring, vd_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    start, count, stop = bounds
    rows_table, q_rows, q_len = tables
    score_scale, tangent_scale = scales
    HAS_TQ: gl.constexpr = FLAGS & 1 != 0
    HAS_TK: gl.constexpr = FLAGS & 2 != 0
    HAS_TV: gl.constexpr = FLAGS & 4 != 0
    HAS_H: gl.constexpr = HAS_TQ or HAS_TK
    ANY: gl.constexpr = HAS_H or HAS_TV
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    o_layout: gl.constexpr = acc_o.type.layout
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    acc_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)

    if EDGE == 2:
        seen = _seen(rows_table, q_rows, q_len, start)[:, None]
    for i in range(count):
        slot = it % STAGES
        phase = (it // STAGES) & 1
        mbarrier.wait(k_full.index(slot), phase)
        k_t = _flat(k_ring.index(slot), BLOCK_N, D_QK).permute([1, 0])
        s = warpgroup_mma(q, k_t, zero, use_acc=False, is_async=True)
        if HAS_H:
            if HAS_TQ:
                s_dot = warpgroup_mma(q_dot, k_t, zero, use_acc=False, is_async=True)
            if HAS_TK:
                kd_t = _flat(kd_ring.index(slot), BLOCK_N, D_QK).permute([1, 0])
                if HAS_TQ:
                    s_dot = warpgroup_mma(q, kd_t, s_dot, is_async=True)
                else:
                    s_dot = warpgroup_mma(q, kd_t, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait((1 if HAS_TQ else 0) + (1 if HAS_TK else 0), deps=[s])
        if EDGE:
            cols = start + i * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
            s = gl.where((cols < stop)[None, :], s, float("-inf"))
            if EDGE == 2:
                s = gl.where(seen, s, float("-inf"))

        m_new = gl.maximum(m_i, gl.max(s, axis=1) * score_scale)
        alpha = gl.exp2(m_i - m_new)
        p = gl.exp2(s * score_scale - m_new[:, None])
        l_i = l_i * alpha + gl.sum(p, axis=1)
        m_i = m_new
        alpha_acc = gl.convert_layout(alpha, acc_row)[:, None]
        p_operand = gl.convert_layout(p.to(q.dtype), p_layout)
        acc_o = acc_o * alpha_acc
        if ANY:
            acc_t = acc_t * alpha_acc

        mbarrier.wait(v_full.index(slot), phase)
        v = _flat(v_ring.index(slot), BLOCK_N, D_V)
        acc_o = warpgroup_mma(p_operand, v, acc_o, is_async=True)
        if HAS_TV:
            acc_t = warpgroup_mma(
                p_operand, _flat(vd_ring.index(slot), BLOCK_N, D_V), acc_t, is_async=True
            )
        if HAS_H:
            s_dot = warpgroup_mma_wait(2 if HAS_TV else 1, deps=[s_dot])
            h = p * (s_dot * tangent_scale)
            r_i = r_i * alpha + gl.sum(h, axis=1)
            acc_t = warpgroup_mma(
                gl.convert_layout(h.to(q.dtype), p_layout), v, acc_t, is_async=True
            )
        mbarrier.arrive(k_empty.index(slot), count=1)
        if ANY:
            acc_o, acc_t = warpgroup_mma_wait(0, deps=[acc_o, acc_t])
        else:
            acc_o = warpgroup_mma_wait(0, deps=[acc_o])
        mbarrier.arrive(v_empty.index(slot), count=1)
        it += 1
    return acc_o, acc_t, m_i, l_i, r_i, it


@gluon.jit
def _write(state, outputs, where, q_rows, q_len, ANY: gl.constexpr):
    """Normalise and store 64 rows: O, O_dot = (A - r O) / l, and the natural log-sum-exp."""
    acc_o, acc_t, m_i, l_i, r_i = state
    o_ptr, od_ptr, lse_ptr, stride_b, stride_l, stride_n = outputs
    batch, head, num_heads = where
    o_layout: gl.constexpr = acc_o.type.layout
    acc_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    inverse = 1.0 / l_i
    inverse_acc = gl.convert_layout(inverse, acc_row)[:, None]
    o = acc_o * inverse_acc
    rows = gl.convert_layout(q_rows, acc_row)
    cols = gl.arange(0, acc_o.shape[1], gl.SliceLayout(0, o_layout))
    keep = (rows < q_len)[:, None]
    base = batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_n
    offsets = base + rows.to(gl.int64)[:, None] * stride_l + cols[None, :]
    gl.store(o_ptr + offsets, o.to(o_ptr.dtype.element_ty), mask=keep)
    if ANY:
        o_dot = acc_t * inverse_acc - gl.convert_layout(r_i * inverse, acc_row)[:, None] * o
        gl.store(od_ptr + offsets, o_dot.to(od_ptr.dtype.element_ty), mask=keep)
    lse = (m_i + gl.log2(l_i)) * 0.6931471805599453
    gl.store(
        lse_ptr + (batch.to(gl.int64) * num_heads + head) * q_len + q_rows, lse, mask=q_rows < q_len
    )


@gluon.jit
def _consume(
    half: gl.constexpr, queries, rings, bars, plan, tables, where, outputs, scales,
    FLAGS: gl.constexpr, CLASSES: gl.constexpr, EDGE: gl.constexpr, BLOCK_N: gl.constexpr,
    D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: its 64 rows against every key tile of the plan, then the epilogue."""
    q_buf, qd_buf = queries
    q_full, k_full, k_empty, v_full, v_empty = bars
    pieces, tile = plan
    rows_table, q_start, q_len = tables
    ANY: gl.constexpr = FLAGS != 0
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D_V, 16]
    )
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q_rows = q_start + half * ROWS + gl.arange(0, ROWS, row_layout)
    acc_o = gl.zeros([ROWS, D_V], gl.float32, o_layout)
    acc_t = gl.zeros([ROWS, D_V], gl.float32, o_layout)
    m_i = gl.full([ROWS], -1.0e30, gl.float32, row_layout)
    l_i = gl.zeros([ROWS], gl.float32, row_layout)
    r_i = gl.zeros([ROWS], gl.float32, row_layout)
    it = 0

    mbarrier.wait(q_full.index(half), 0)
    q = _flat(q_buf.index(half), ROWS, D_QK)
    q_dot = _flat(qd_buf.index(half), ROWS, D_QK)
    ring_bars = (k_full, k_empty, v_full, v_empty)
    row_tables = (rows_table, q_rows, q_len)
    for kind in gl.static_range(3):
        if CLASSES & (1 << kind):
            for piece in range(gl.load(tile + 1 + kind), gl.load(tile + 2 + kind)):
                bounds = (
                    gl.load(pieces + 4 * piece),
                    gl.load(pieces + 4 * piece + 1),
                    gl.load(pieces + 4 * piece + 2),
                )
                acc_o, acc_t, m_i, l_i, r_i, it = _consume_piece(
                    (acc_o, acc_t, m_i, l_i, r_i), (q, q_dot), rings, ring_bars, bounds, row_tables,
                    scales, it, FLAGS & 1 if kind == 0 else FLAGS, EDGE if kind == 2 else 0,
                    BLOCK_N, D_QK, D_V, STAGES,
                )  # fmt: skip
    _write((acc_o, acc_t, m_i, l_i, r_i), outputs, where, q_rows, q_len, ANY)


@gluon.jit(do_not_specialize=["num_tiles", "num_heads", "q_len", "tangent_start"])
def hopper_forward(
    q_desc, qd_desc, k_desc, kd_desc, v_desc, vd_desc, o_ptr, od_ptr, lse_ptr, tiles, pieces,
    rows_table, num_tiles, num_heads, q_len, tangent_start, stride_b, stride_l, stride_n,
    score_scale, tangent_scale,
    FLAGS: gl.constexpr, CLASSES: gl.constexpr, EDGE: gl.constexpr, BLOCK_N: gl.constexpr,
    D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per (batch, head, query tile); programs of a head are neighbours, its longest
    tiles first.

    FLAGS, CLASSES and EDGE as in `forward.portable_forward`; outputs are [B, L, N, D] with a unit
    last stride.
    """
    pid = gl.program_id(0)
    tile = tiles + 8 * (pid % num_tiles)
    head = (pid // num_tiles) % num_heads
    batch = pid // num_tiles // num_heads
    q_start = gl.load(tile)

    dtype: gl.constexpr = q_desc.dtype
    q_buf = gl.allocate_shared_memory(dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    qd_buf = q_buf
    kd_ring = k_ring
    vd_ring = v_ring
    if FLAGS & 1:
        qd_buf = gl.allocate_shared_memory(dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    if FLAGS & 2:
        kd_ring = gl.allocate_shared_memory(
            dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout
        )
    if FLAGS & 4:
        vd_ring = gl.allocate_shared_memory(
            dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout
        )
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)

    descs = (q_desc, qd_desc, k_desc, kd_desc, v_desc, vd_desc)
    buffers = (q_buf, qd_buf, k_ring, kd_ring, v_ring, vd_ring)
    rings = (k_ring, kd_ring, v_ring, vd_ring)
    bars = (q_full, k_full, k_empty, v_full, v_empty)
    plan = (pieces, tile)
    tables = (rows_table, q_start, q_len)
    outputs = (o_ptr, od_ptr, lse_ptr, stride_b, stride_l, stride_n)
    queries = (q_buf, qd_buf)
    where = (batch, head, num_heads)
    scales = (score_scale, tangent_scale)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, queries, rings, bars, plan, tables, where, outputs, scales, FLAGS, CLASSES,
                    EDGE, BLOCK_N, D_QK, D_V, STAGES,
                ),
            ),
            (
                _consume,
                (
                    1, queries, rings, bars, plan, tables, where, outputs, scales, FLAGS, CLASSES,
                    EDGE, BLOCK_N, D_QK, D_V, STAGES,
                ),
            ),
            (
                _produce,
                (
                    descs, buffers, bars, plan, (batch, head, q_start, tangent_start), FLAGS,
                    BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
