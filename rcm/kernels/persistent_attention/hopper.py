"""The Hopper kernel of dense attention without gradient: a persistent grid, a producer warp of bulk
copies, independent consumer warpgroups.

A program works through jobs, each one query tile against a run of key tiles: first whole query
tiles, then an equal share of what remains, cut wherever it falls; cut tiles leave partial results.
A consumer owns 64 query rows. Its two products of an iteration, S of this key tile and P V of the
one before, are under way together, and softmax arithmetic runs under the second. Shapes in
comments: M rows, J keys. Operands have 16 bits, or are coded in e4m3 in the format of
`fp8_attention.codes`: their dtype says which, and is all that is specialised.
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

from rcm.kernels.persistent_attention.tiles import largest, masked, operand, ordered, thread_sums

ROWS = gl.constexpr(64)
"""Query rows of one consumer warpgroup: the height of a warpgroup product."""
CODED_TOP = gl.constexpr(8.0)
"""The largest weight of a row is stored as 2**8 where it is coded: e4m3 ends at 448, and keeps 3
bits down to 2**-6.
"""


@gluon.jit
def _job(index, program, programs, plan):
    """Query tile, first and last key tile (exclusive) of a program's job `index`; an empty run
    where there is none.
    """
    whole, remaining, blocks, sharers = plan
    shared = remaining * blocks
    start = gl.minimum(program * shared // sharers, shared)
    stop = gl.minimum((program + 1) * shared // sharers, shared)
    tile = start // blocks
    low = start - tile * blocks
    high = gl.minimum(blocks, low + stop - start)
    rest = stop - start - (high - low)
    second = index > whole
    low = gl.where(second, 0, low)
    high = gl.where(second, rest, high)
    tile = whole * programs + tile + second.to(gl.int32)
    first = index < whole
    tile = gl.where(first, index * programs + program, tile)
    return tile, gl.where(first, 0, low), gl.where(first, blocks, high)


@gluon.jit
def _fill(desc, ring, full, empty, it, pair, row, column, batch, STAGES: gl.constexpr):
    """One ring slot: the box of `desc` at (batch, pair, row, column). What lies outside arrives as
    zeros.
    """
    slot = it % STAGES
    mbarrier.wait(empty.index(slot), ((it // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        desc, [batch, pair, row, column], full.index(slot), ring.index(slot)
    )


@gluon.jit
def _produce(
    descs, buffers, bars, plan, shape,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: per job the query rows of every consumer, then key tiles from the last to
    the first.
    """
    q_desc, k_desc, v_desc = descs
    q_buf, k_ring, v_ring = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    heads, tiles_per_head = shape
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    it = 0
    done = 0
    for index in range(plan[0] + 2):
        tile, low, high = _job(index, program, programs, plan)
        if high > low:
            pair = tile // tiles_per_head
            row = (tile % tiles_per_head) * (CONSUMERS * ROWS)
            batch = pair // heads
            head = pair % heads
            for half in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(half), (done & 1) ^ 1)
                mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_desc,
                    [batch, head, row + half * ROWS, 0],
                    q_full.index(half),
                    q_buf.index(half),
                )
            done += 1
            for i in range(high - low):
                key = (high - 1 - i) * BLOCK_N
                _fill(k_desc, k_ring, k_full, k_empty, it, head, key, 0, batch, STAGES)
                if v_desc.dtype == gl.float8e4nv:
                    _fill(v_desc, v_ring, v_full, v_empty, it, head, 0, key, batch, STAGES)
                else:
                    _fill(v_desc, v_ring, v_full, v_empty, it, head, key, 0, batch, STAGES)
                it += 1


@gluon.jit
def _row_scale(row_scale, pair, q_rows, q_len, CODED: gl.constexpr):
    """What makes base-2 exponents of scores, [M]: of every row where queries are coded, else one
    number.
    """
    return (
        gl.load(row_scale + pair * q_len + q_rows, mask=q_rows < q_len, other=1.0)
        if CODED
        else gl.full([ROWS], row_scale, gl.float32, q_rows.type.layout)
    )


@gluon.jit
def _keys(k_ring, slot, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    """A slot as the right operand of Q K^T [D, J]."""
    return k_ring.index(slot).reshape([BLOCK_N, WIDTH]).permute([1, 0])


@gluon.jit
def _values(v_ring, slot, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    """A slot as the right operand of P V [J, D]; coded values are stored [D, J]."""
    slot = v_ring.index(slot)
    return (
        slot.reshape([WIDTH, BLOCK_N]).permute([1, 0])
        if v_ring.dtype == gl.float8e4nv
        else slot.reshape([BLOCK_N, WIDTH])
    )


@gluon.jit
def _consume(
    half: gl.constexpr, buffers, bars, task,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: its 64 rows of every job. TWO_LEVEL: every product P V is a sum of
    its own, added in float32, since tensor cores keep some 14 bits of what they accumulate of
    e4m3; it takes the registers of the last one. Otherwise they accumulate.
    """
    q_buf, k_ring, v_ring = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    plan, shape, outputs, lengths = task
    heads, tiles_per_head = shape
    q_len, kv_len = lengths
    dtype: gl.constexpr = q_buf.dtype
    CODED: gl.constexpr = dtype == gl.float8e4nv
    TOP: gl.constexpr = CODED_TOP if CODED else 0.0
    DEPTH: gl.constexpr = 32 if CODED else 16
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, DEPTH]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, DEPTH]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, k_width=4 if CODED else 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    it = 0
    done = 0
    for index in range(plan[0] + 2):
        tile, low, high = _job(index, program, programs, plan)
        if high > low:
            pair = tile // tiles_per_head
            first = (tile % tiles_per_head) * (CONSUMERS * ROWS) + half * ROWS
            q_rows = first + gl.arange(0, ROWS, row_layout)
            scale = _row_scale(outputs[0], pair, q_rows, q_len, CODED)
            mbarrier.wait(q_full.index(half), done & 1)
            q = q_buf.index(half).reshape([ROWS, WIDTH])
            # the tile with the last keys comes first: only there are columns to be masked
            slot = it % STAGES
            mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
            k = _keys(k_ring, slot, BLOCK_N, WIDTH)
            s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            s = masked(s, (high - 1) * BLOCK_N, kv_len, CODED)
            floor = largest(s, row_layout) * scale - TOP
            p = gl.exp2(s * scale[:, None] - floor[:, None])
            total = thread_sums(p)
            sum_row: gl.constexpr = gl.SliceLayout(1, total.type.layout)
            acc = gl.zeros([ROWS, WIDTH], gl.float32, o_layout)
            found = acc
            alpha = gl.full([ROWS], 1.0, gl.float32, acc_row)

            for _ in range(high - low - 1):
                ahead = (it + 1) % STAGES
                slot = it % STAGES
                weights = operand(p, dtype, p_layout)
                mbarrier.wait(k_full.index(ahead), ((it + 1) // STAGES) & 1)
                k = _keys(k_ring, ahead, BLOCK_N, WIDTH)
                s = warpgroup_mma(q, k, p, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
                v = _values(v_ring, slot, BLOCK_N, WIDTH)
                found = warpgroup_mma(
                    weights, v, found if TWO_LEVEL else acc, use_acc=not TWO_LEVEL, is_async=True
                )
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(ahead), count=1)
                raised = gl.maximum(floor, largest(s, row_layout) * scale - TOP)
                change = gl.exp2(floor - raised)
                p = gl.exp2(s * scale[:, None] - raised[:, None])
                total = ordered(
                    total * gl.convert_layout(change, sum_row)[:, None] + thread_sums(p)
                )
                floor = raised
                found = warpgroup_mma_wait(0, deps=[found])
                mbarrier.arrive(v_empty.index(slot), count=1)
                change = gl.convert_layout(change, acc_row)
                acc = acc * alpha[:, None] + found if TWO_LEVEL else found * change[:, None]
                alpha = change
                it += 1

            mbarrier.arrive(q_empty.index(half), count=1)
            slot = it % STAGES
            mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
            v = _values(v_ring, slot, BLOCK_N, WIDTH)
            weights = operand(p, dtype, p_layout)
            found = warpgroup_mma(
                weights, v, found if TWO_LEVEL else acc, use_acc=not TWO_LEVEL, is_async=True
            )
            found = warpgroup_mma_wait(0, deps=[found])
            mbarrier.arrive(v_empty.index(slot), count=1)
            acc = acc * alpha[:, None] + found if TWO_LEVEL else found
            it += 1
            done += 1
            where, job = (pair, heads, q_rows, q_len), (index, low, high, half)
            _write(acc, floor, total, outputs, where, plan, job, CONSUMERS)


@gluon.jit
def _write(acc, floor, total, outputs, where, plan, job, CONSUMERS: gl.constexpr):
    """64 rows of a result, decoded if coded: into the output if the job was a whole query tile,
    else, with the base-2 log-sum-exp, as a part.
    """
    _, value_scale, value_center, o_ptr, stride_b, stride_l, stride_n, part_o, part_lse = outputs
    pair, heads, q_rows, q_len = where
    index, low, high, half = job
    WIDTH: gl.constexpr = acc.shape[1]
    o_layout: gl.constexpr = acc.type.layout
    total = gl.convert_layout(gl.sum(total, axis=1), q_rows.type.layout)
    inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout))
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, o_layout))
    head = pair % heads
    if value_scale is None:
        result = acc * inverse[:, None]
    else:
        spread = gl.load(value_scale + head * WIDTH + channel)
        center = gl.load(value_center + head * WIDTH + channel)
        result = acc * inverse[:, None] * spread[None, :] + center[None, :]
    rows = gl.convert_layout(q_rows, gl.SliceLayout(1, o_layout))
    part = 2 * gl.program_id(0) + (index > plan[0]).to(gl.int32)
    whole = (low == 0) & (high == plan[2])
    lse = floor + gl.log2(total)
    if whole:
        base = (pair // heads).to(gl.int64) * stride_b + (pair % heads).to(gl.int64) * stride_n
        offsets = base + rows.to(gl.int64)[:, None] * stride_l + channel[None, :]
        gl.store(o_ptr + offsets, result.to(o_ptr.dtype.element_ty), mask=(rows < q_len)[:, None])
    else:
        place = (part * CONSUMERS + half) * ROWS
        row_layout: gl.constexpr = q_rows.type.layout
        acc_row: gl.constexpr = rows.type.layout
        line = gl.arange(0, ROWS, acc_row)
        slots = (place + line)[:, None] * WIDTH + channel[None, :]
        gl.store(part_o + slots, result.to(part_o.dtype.element_ty))
        gl.store(part_lse + place + gl.arange(0, ROWS, row_layout), lse)


@gluon.jit(
    do_not_specialize=[
        "whole",
        "remaining",
        "blocks",
        "sharers",
        "heads",
        "tiles_per_head",
        "q_len",
        "kv_len",
    ]
)
def hopper_forward(
    q_desc, k_desc, v_desc, row_scale, value_scale, value_center, o_ptr, part_o, part_lse,
    whole, remaining, blocks, sharers, heads, tiles_per_head, q_len, kv_len,
    stride_b, stride_l, stride_n,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    TWO_LEVEL: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As many programs as there are processors. `whole` query tiles for each, then for `sharers` of
    them a share of the `remaining` ones, of `blocks` key tiles each. Outputs are [B, L, N, D] with
    a unit last stride; parts as `merge_parts` takes them. `row_scale` is a number where operands
    are not coded, and `value_scale`, `value_center` are None.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_buf = gl.allocate_shared_memory(dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)

    descs = (q_desc, k_desc, v_desc)
    buffers = (q_buf, k_ring, v_ring)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    plan = (whole, remaining, blocks, sharers)
    shape = (heads, tiles_per_head)
    outputs = (
        row_scale, value_scale, value_center, o_ptr, stride_b, stride_l, stride_n, part_o, part_lse,
    )  # fmt: skip
    task = (plan, shape, outputs, (q_len, kv_len))
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, buffers, bars, task, CONSUMERS, BLOCK_N, WIDTH, STAGES, TWO_LEVEL)),
                (_consume, (1, buffers, bars, task, CONSUMERS, BLOCK_N, WIDTH, STAGES, TWO_LEVEL)),
                (_produce, (descs, buffers, bars, plan, shape, CONSUMERS, BLOCK_N, STAGES)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, buffers, bars, task, CONSUMERS, BLOCK_N, WIDTH, STAGES, TWO_LEVEL)),
                (_consume, (1, buffers, bars, task, CONSUMERS, BLOCK_N, WIDTH, STAGES, TWO_LEVEL)),
                (_consume, (2, buffers, bars, task, CONSUMERS, BLOCK_N, WIDTH, STAGES, TWO_LEVEL)),
                (_produce, (descs, buffers, bars, plan, shape, CONSUMERS, BLOCK_N, STAGES)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24],
        )
