"""Triton kernels of the row norms: y = n(x) * gain + shift with forward, tangent and gradient, one
read of x each.

n(x) is (x - mean) / std (CENTER) or x / rms. Rows are [B, F, S] vectors of WIDTH channels at any
strides; gain and shift have one row per (b, f), or the same for all at stride 0. A program takes
ROWS tokens of one (b, f) and holds their gain and shift in registers. All arithmetic is float32;
statistics are recomputed by each kernel, so nothing but x is kept for the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(frames, tokens, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(batch, frame, first token, last token + 1, group, program) of this program, 64 bit; its
    channels, and which of them exist.
    """
    program = tl.program_id(0).to(tl.int64)
    chunks = (tokens + ROWS - 1) // ROWS
    group = program // chunks
    start = (program % chunks) * ROWS
    batch, frame, stop = group // frames, group % frames, tl.minimum(start + ROWS, tokens)
    cols = tl.arange(0, BLOCK)
    return batch, frame, start, stop, group, program, cols, cols < WIDTH


@triton.jit
def _vector(described, batch, frame, cols, inside):
    """Row (batch, frame) of a gain, a shift or a tangent of one, as float32; padding channels are
    zeros.
    """
    ptr, stride_b, stride_f = described
    return tl.load(ptr + batch * stride_b + frame * stride_f + cols, mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _token(described, batch, frame, token, cols, inside):
    """Channels of one token as float32; padding channels are zeros."""
    ptr, stride_b, stride_f, stride_s = described
    return tl.load(
        ptr + batch * stride_b + frame * stride_f + token * stride_s + cols, mask=inside, other=0.0
    ).to(tl.float32)


@triton.jit
def _normalised(x, inside, eps, CENTER: tl.constexpr, WIDTH: tl.constexpr):
    """n(x) and 1 / std (1 / rms)."""
    if CENTER:
        x = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    return x * inverse, inverse


@triton.jit(do_not_specialize=["frames", "tokens"])
def norm_forward(
    x, gain, shift, y_ptr, frames, tokens, eps,
    CENTER: tl.constexpr, OFFSET: tl.constexpr, HAS_SHIFT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = n(x) * (OFFSET + gain) [+ shift]; y is contiguous."""
    batch, frame, start, stop, group, program, cols, inside = _place(
        frames, tokens, ROWS, WIDTH, BLOCK
    )
    factor = _vector(gain, batch, frame, cols, inside) + OFFSET
    if HAS_SHIFT:
        added = _vector(shift, batch, frame, cols, inside)
    for token in range(start, stop):
        n, inverse = _normalised(
            _token(x, batch, frame, token, cols, inside), inside, eps, CENTER, WIDTH
        )
        y = n * factor
        if HAS_SHIFT:
            y += added
        tl.store(
            y_ptr + (group * tokens + token) * WIDTH + cols,
            y.to(y_ptr.dtype.element_ty),
            mask=inside,
        )


@triton.jit(do_not_specialize=["frames", "tokens"])
def norm_tangent(
    x, x_dot, gain, gain_dot, shift, shift_dot, y_ptr, y_dot_ptr, frames, tokens, eps,
    CENTER: tl.constexpr, OFFSET: tl.constexpr, HAS_SHIFT: tl.constexpr, FLAGS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y and y_dot = n_dot * (OFFSET + gain) + n * gain_dot + shift_dot. FLAGS: 1, 2, 4 for a
    tangent of x, gain, shift.
    """
    batch, frame, start, stop, group, program, cols, inside = _place(
        frames, tokens, ROWS, WIDTH, BLOCK
    )
    factor = _vector(gain, batch, frame, cols, inside) + OFFSET
    if HAS_SHIFT:
        added = _vector(shift, batch, frame, cols, inside)
    if FLAGS & 2 != 0:
        factor_dot = _vector(gain_dot, batch, frame, cols, inside)
    if FLAGS & 4 != 0:
        added_dot = _vector(shift_dot, batch, frame, cols, inside)
    for token in range(start, stop):
        n, inverse = _normalised(
            _token(x, batch, frame, token, cols, inside), inside, eps, CENTER, WIDTH
        )
        y = n * factor
        if HAS_SHIFT:
            y += added
        y_dot = tl.zeros_like(y)
        if FLAGS & 1 != 0:
            moved = _token(x_dot, batch, frame, token, cols, inside)
            if CENTER:
                moved = tl.where(inside, moved - tl.sum(moved, axis=0) / WIDTH, 0.0)
            y_dot += inverse * (moved - n * (tl.sum(moved * n, axis=0) / WIDTH)) * factor
        if FLAGS & 2 != 0:
            y_dot += n * factor_dot
        if FLAGS & 4 != 0:
            y_dot += added_dot
        place = (group * tokens + token) * WIDTH + cols
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_dot_ptr + place, y_dot.to(y_dot_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["frames", "tokens"])
def norm_backward(
    x, gain, grad_y, carried, grad_x_ptr, gain_parts_ptr, shift_parts_ptr, frames, tokens, eps,
    CENTER: tl.constexpr, OFFSET: tl.constexpr, NEEDS: tl.constexpr, CARRIED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x, contiguous, with CARRIED on top of the gradient that x has from elsewhere, and this
    program's sums over its tokens for gain and shift. NEEDS: 1, 2, 4 for x, gain, shift.
    """
    batch, frame, start, stop, group, program, cols, inside = _place(
        frames, tokens, ROWS, WIDTH, BLOCK
    )
    factor = _vector(gain, batch, frame, cols, inside) + OFFSET
    gain_sum = tl.zeros([BLOCK], dtype=tl.float32)
    shift_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for token in range(start, stop):
        grad = _token(grad_y, batch, frame, token, cols, inside)
        if NEEDS & 3 != 0:
            n, inverse = _normalised(
                _token(x, batch, frame, token, cols, inside), inside, eps, CENTER, WIDTH
            )
        if NEEDS & 2 != 0:
            gain_sum += grad * n
        if NEEDS & 4 != 0:
            shift_sum += grad
        if NEEDS & 1 != 0:
            grad_n = grad * factor
            pulled = grad_n - n * (tl.sum(grad_n * n, axis=0) / WIDTH)
            if CENTER:
                pulled -= tl.sum(grad_n, axis=0) / WIDTH
            pulled *= inverse
            if CARRIED:
                pulled += _token(carried, batch, frame, token, cols, inside)
            place = (group * tokens + token) * WIDTH + cols
            tl.store(grad_x_ptr + place, pulled.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if NEEDS & 2 != 0:
        tl.store(gain_parts_ptr + program * WIDTH + cols, gain_sum, mask=inside)
    if NEEDS & 4 != 0:
        tl.store(shift_parts_ptr + program * WIDTH + cols, shift_sum, mask=inside)
