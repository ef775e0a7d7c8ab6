"""What a consumer warpgroup of the Hopper kernel does with a tile in registers: the scores' maxima,
masks and sums, and the weights as an operand. Shapes in comments: M rows, J keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
