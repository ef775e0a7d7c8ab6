"""Triton kernels that round to e4m3: rows under one scale per row, amax, scale and cast in one
pass, after a GELU if asked; columns under one per column, in two, written as rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rcm.kernels.fused.pointwise_kernels import _gelu


@triton.jit
def quantise_rows(
    x_ptr, q_ptr, scale_ptr, row_stride,
    GELU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q = e4m3(x * (448 / amax)) and scale = amax / 448 of one row per program, held in registers;
    q is contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    loaded = tl.load(x_ptr + row * row_stride + cols, mask=inside, other=0.0)
    x = loaded.to(tl.float32)
    if GELU:
        x, slope = _gelu(x)
        # rounded as the layer in between would hand it over
        x = x.to(loaded.dtype).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30)
    q = x * tl.div_rn(448.0, amax)
    tl.store(q_ptr + row * WIDTH + cols, q.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, tl.div_rn(amax, 448.0))


@triton.jit(do_not_specialize=["rows"])
def column_amax(
    x_ptr, parts_ptr, rows, row_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest magnitudes of BLOCK columns over the ROWS rows of this program; a NaN stays one."""
    program = tl.program_id(0).to(tl.int64)
    start = program * ROWS
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    found = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(start, tl.minimum(start + ROWS, rows)):
        x = tl.load(x_ptr + row * row_stride + cols, mask=inside, other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    tl.store(parts_ptr + program * WIDTH + cols, found, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quantise_columns(
    x_ptr, amax_ptr, q_ptr, scale_ptr, rows, row_stride, q_stride,
    WIDTH: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of TALL rows and WIDE columns, turned: q[column, row] = e4m3(x * (448 / amax)) up to
    row `q_stride`, zeros behind the last row, and the columns' scale = amax / 448.
    """
    place = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    cols = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = cols < WIDTH
    amax = tl.maximum(tl.load(amax_ptr + cols, mask=inside, other=0.0), 1e-30)
    x = tl.load(
        x_ptr + place[:, None] * row_stride + cols[None, :],
        mask=(place < rows)[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    q = tl.trans((x * tl.div_rn(448.0, amax)[None, :]).to(q_ptr.dtype.element_ty))
    written = inside[:, None] & (place < q_stride)[None, :]
    tl.store(q_ptr + cols[:, None].to(tl.int64) * q_stride + place[None, :], q, mask=written)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + cols, tl.div_rn(amax, 448.0), mask=inside)
