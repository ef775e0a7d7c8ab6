"""Triton kernel that rounds rows to e4m3 under one scale per row: amax, scale and cast in one pass,
after a GELU if asked.
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
