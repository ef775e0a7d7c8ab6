"""What a consumer warpgroup of the Hopper kernel does with a tile in registers: the scores' maxima,
masks and sums, and the weights as an operand. Shapes in comments: M rows, J keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def largest(s, ROW_LAYOUT: gl.constexpr):
    """Largest score of every row [M]. Pairs first, so that the chain of dependent comparisons is
    half as long.
    """
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    top = gl.max(gl.max(gl.max(s.reshape([M, J // 8, 4, 2]), axis=3), axis=1), axis=1)
    return gl.convert_layout(top, ROW_LAYOUT)


@gluon.jit
def masked(s, first, kv_len, CODED: gl.constexpr):
    """Scores of a tile whose keys begin at `first`, without the columns of keys that are not there;
    within 16 columns coded keys have the order ROW of `fp8_attention.codes`.
    """
    column = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    key = first + column
    if CODED:
        key = first + (column & ~15) + ((column & 6) << 1) + ((column & 8) >> 2) + (column & 1)
    return gl.where((key < kv_len)[None, :], s, float("-inf"))


@gluon.jit
def thread_sums(p):
    """[M, 4]: what each of the four threads of a row has of its sum. They are added up once, at the
    end.
    """
    M: gl.constexpr = p.shape[0]
    J: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape([M, J // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def operand(p, dtype: gl.constexpr, P_LAYOUT: gl.constexpr):
    """Weights [M, J] as the left operand of P V; nothing moves. In 16 bits the registers of a
    result are those of an operand. In e4m3 they are, within 16 keys, those of another order of the
    keys: K is stored in the one order and V in the other.
    """
    M: gl.constexpr = p.shape[0]
    J: gl.constexpr = p.shape[1]
    if dtype == gl.float8e4nv:
        p = gl.permute(p.reshape([M, J // 16, 2, 4, 2]), [0, 1, 3, 2, 4]).reshape([M, J])
    return gl.convert_layout(p, P_LAYOUT).to(dtype)


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
def rescaled(acc, alpha):
    """`acc` times `alpha` [M, 1]; most often the maximum of no row of a warp has grown, and nothing
    is to be done.
    """
    layout: gl.constexpr = acc.type.layout
    wide = gl.zeros([acc.shape[0], acc.shape[1]], gl.float32, layout) + alpha
    return gl.inline_asm_elementwise(
        RESCALE, RESCALE_OPERANDS, [acc, wide], dtype=gl.float32, is_pure=True, pack=64
    )


@gluon.jit
def weigh(acc, alpha, found, p, v, TWO_LEVEL: gl.constexpr):
    """Start P V. TWO_LEVEL: a sum of its own, which `weighed` adds in float32, since tensor cores
    keep some 14 bits of what they accumulate; it takes the registers of the last one. Otherwise
    they accumulate.
    """
    if TWO_LEVEL:
        return warpgroup_mma(p, v, found, use_acc=False, is_async=True)
    return warpgroup_mma(p, v, rescaled(acc, alpha), is_async=True)


@gluon.jit
def weighed(acc, alpha, found, TWO_LEVEL: gl.constexpr):
    return acc * alpha + found if TWO_LEVEL else found


@gluon.jit
def ordered(total):
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
