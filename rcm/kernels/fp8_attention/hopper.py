"""The Hopper kernel of FP8 attention: a persistent grid, a producer warp of bulk copies,
independent consumer warpgroups.

A program works through jobs, each one query tile against a run of key tiles: first whole query
tiles, then an equal share of what remains, cut wherever it falls; cut tiles leave partial results.
A consumer owns 64 query rows. Its two products of an iteration, S of this key tile and P V of the
one before, are under way together, and softmax arithmetic runs under the second. Shapes in
comments: M rows, J keys. The format of the operands is in `reference`.
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
TOP = gl.constexpr(8.0)
"""The largest weight of a row is stored as 2**TOP: e4m3 ends at 448, and keeps 3 bits down to
2**-6.
"""


@gluon.jit
def _job(index, program, programs, plan):
    """Query tile, first and last key tile (exclusive) of a program's job `index`; an empty run
    where there is none.
    """
    whole, remaining, blocks = plan
    shared = remaining * blocks
    start = program * shared // programs
    stop = (program + 1) * shared // programs
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
                _fill(v_desc, v_ring, v_full, v_empty, it, head, 0, key, batch, STAGES)
                it += 1


@gluon.jit
def _top(s, ROW_LAYOUT: gl.constexpr):
    """Largest score of every row [M]. Pairs first, so that the chain of dependent comparisons is
    half as long.
    """
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    top = gl.max(gl.max(gl.max(s.reshape([M, J // 8, 4, 2]), axis=3), axis=1), axis=1)
    return gl.convert_layout(top, ROW_LAYOUT)


@gluon.jit
def _masked(s, first, kv_len):
    """Scores of a tile whose keys begin at `first`, without the columns of keys that are not there;
    within 16 columns keys have the order ROW of `codes`.
    """
    column = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    key = first + (column & ~15) + ((column & 6) << 1) + ((column & 8) >> 2) + (column & 1)
    return gl.where((key < kv_len)[None, :], s, float("-inf"))


@gluon.jit
def _sums(p):
    """[M, 4]: what each of the four threads of a row has of its sum. They are added up once, at the
    end.
    """
    M: gl.constexpr = p.shape[0]
    J: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape([M, J // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def _weights(p, P_LAYOUT: gl.constexpr):
    """Weights [M, J] in e4m3 as the left operand of P V. Within 16 keys the registers of a result
    are those of an operand in another order of the keys: K is stored in the one order and V in the
    other, so nothing moves.
    """
    M: gl.constexpr = p.shape[0]
    J: gl.constexpr = p.shape[1]
    p = gl.permute(p.reshape([M, J // 16, 2, 4, 2]), [0, 1, 3, 2, 4]).reshape([M, J])
    return gl.convert_layout(p, P_LAYOUT).to(gl.float8e4nv)


RESCALE = gl.constexpr(
    "{ .reg .pred same, all; setp.eq.f32 same, $128, 0f3F800000; setp.eq.and.f32 same, $130,"
    " 0f3F800000, same; "
    + "vote.sync.all.pred all, same, 0xffffffff; "
    + " ".join(f"mov.f32 ${i}, ${64 + i};" for i in range(64))
    + " @all bra DONE; "
    + " ".join(f"mul.f32 ${i}, ${i}, ${128 + i};" for i in range(64))
    + " DONE: }"
)
RESCALE_OPERANDS = gl.constexpr(",".join(["=&f"] * 64 + ["f"] * 128))


@gluon.jit
def _rescaled(acc, alpha):
    """`acc` times `alpha` [M, 1]; most often the maximum of no row of a warp has grown, and nothing
    is to be done.
    """
    layout: gl.constexpr = acc.type.layout
    wide = gl.zeros([acc.shape[0], acc.shape[1]], gl.float32, layout) + alpha
    return gl.inline_asm_elementwise(
        RESCALE, RESCALE_OPERANDS, [acc, wide], dtype=gl.float32, is_pure=True, pack=64
    )


@gluon.jit
def _weigh(acc, alpha, found, p, v, TWO_LEVEL: gl.constexpr):
    """Start P V. TWO_LEVEL: a sum of its own, which `_weighed` adds in float32, since tensor cores
    keep some 14 bits of what they accumulate; it takes the registers of the last one. Otherwise
    they accumulate.
    """
    if TWO_LEVEL:
        return warpgroup_mma(p, v, found, use_acc=False, is_async=True)
    return warpgroup_mma(p, v, _rescaled(acc, alpha), is_async=True)


@gluon.jit
def _weighed(acc, alpha, found, TWO_LEVEL: gl.constexpr):
    return acc * alpha + found if TWO_LEVEL else found


@gluon.jit
def _ordered(total):
    """`total`, which is positive, behind a store that never happens: ptxas puts no wait for a
    product before it, and so none before the arithmetic that gives `total`.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; .reg .b32 at; mov.b32 at, 0; setp.lt.f32 never, $1, 0f00000000; "
        "@never st.volatile.shared.f32 [at], $1; mov.f32 $0, $1; }",
        "=f,f",
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _consume(
    half: gl.constexpr, buffers, bars, task,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: its 64 rows of every job."""
    q_buf, k_ring, v_ring = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    plan, shape, outputs, lengths = task
    heads, tiles_per_head = shape
    row_scale = outputs[0]
    q_len, kv_len = lengths
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=4)
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
            q_rows = (
                (tile % tiles_per_head) * (CONSUMERS * ROWS)
                + half * ROWS
                + gl.arange(0, ROWS, row_layout)
            )
            scale = gl.load(row_scale + pair * q_len + q_rows, mask=q_rows < q_len, other=1.0)
            mbarrier.wait(q_full.index(half), done & 1)
            q = q_buf.index(half).reshape([ROWS, WIDTH])

            # the tile with the last keys comes first: only there are columns to be masked
            slot = it % STAGES
            mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
            s = warpgroup_mma(
                q,
                k_ring.index(slot).reshape([BLOCK_N, WIDTH]).permute([1, 0]),
                zero,
                use_acc=False,
                is_async=True,
            )
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            s = _masked(s, (high - 1) * BLOCK_N, kv_len)
            floor = _top(s, row_layout) * scale - TOP
            p = gl.exp2(s * scale[:, None] - floor[:, None])
            total = _sums(p)
            sum_row: gl.constexpr = gl.SliceLayout(1, total.type.layout)
            acc = gl.zeros([ROWS, WIDTH], gl.float32, o_layout)
            found = acc
            alpha = gl.full([ROWS], 1.0, gl.float32, acc_row)

            for _ in range(high - low - 1):
                ahead = (it + 1) % STAGES
                slot = it % STAGES
                weights = _weights(p, p_layout)
                mbarrier.wait(k_full.index(ahead), ((it + 1) // STAGES) & 1)
                k = k_ring.index(ahead).reshape([BLOCK_N, WIDTH]).permute([1, 0])
                s = warpgroup_mma(q, k, p, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
                v = v_ring.index(slot).reshape([WIDTH, BLOCK_N]).permute([1, 0])
                found = _weigh(acc, alpha[:, None], found, weights, v, TWO_LEVEL)
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(ahead), count=1)
                raised = gl.maximum(floor, _top(s, row_layout) * scale - TOP)
                change = gl.exp2(floor - raised)
                p = gl.exp2(s * scale[:, None] - raised[:, None])
                total = _ordered(total * gl.convert_layout(change, sum_row)[:, None] + _sums(p))
                floor = raised
                found = warpgroup_mma_wait(0, deps=[found])
                mbarrier.arrive(v_empty.index(slot), count=1)
                acc = _weighed(acc, alpha[:, None], found, TWO_LEVEL)
                alpha = gl.convert_layout(change, acc_row)
                it += 1

            mbarrier.arrive(q_empty.index(half), count=1)
            slot = it % STAGES
            mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
            v = v_ring.index(slot).reshape([WIDTH, BLOCK_N]).permute([1, 0])
            found = _weigh(acc, alpha[:, None], found, _weights(p, p_layout), v, TWO_LEVEL)
            found = warpgroup_mma_wait(0, deps=[found])
            mbarrier.arrive(v_empty.index(slot), count=1)
            acc = _weighed(acc, alpha[:, None], found, TWO_LEVEL)
            it += 1
            done += 1

            where, job = (pair, heads, q_rows, q_len), (index, low, high, half)
            _write(acc, floor, total, outputs, where, plan, job, CONSUMERS)


@gluon.jit
def _write(acc, floor, total, outputs, where, plan, job, CONSUMERS: gl.constexpr):
    """64 rows of a result, decoded: into the output if the job was a whole query tile, else, with
    the base-2 log-sum-exp, as a part.
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
    do_not_specialize=["whole", "remaining", "blocks", "heads", "tiles_per_head", "q_len", "kv_len"]
)
def hopper_forward(
    q_desc, k_desc, v_desc, row_scale, value_scale, value_center, o_ptr, part_o, part_lse,
    whole, remaining, blocks, heads, tiles_per_head, q_len, kv_len, stride_b, stride_l, stride_n,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    TWO_LEVEL: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As many programs as there are processors. `whole` query tiles for each, then a share of the
    `remaining` ones, of `blocks` key tiles each. Outputs are [B, L, N, D] with a unit last stride;
    parts as `merge` takes them.
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
    plan = (whole, remaining, blocks)
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
