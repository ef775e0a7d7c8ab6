"""Triton kernels without a reduction over channels: gated residual add, GELU (tanh form), rotation
of channel pairs; float32 arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rcm.kernels.fused.norm_kernels import _place, _token, _vector


@triton.jit(do_not_specialize=["frames", "tokens"])
def gated_add_forward(
    x, x_dot, y, y_dot, gate, gate_dot, out_ptr, out_dot_ptr, frames, tokens,
    FLAGS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x + gate * y with the gate rounded to the dtype of out, and its tangent. FLAGS: 1, 2, 4
    for a tangent of x, y, gate.
    """
    batch, frame, start, stop, group, program, cols, inside = _place(
        frames, tokens, ROWS, WIDTH, BLOCK
    )
    element: tl.constexpr = out_ptr.dtype.element_ty
    factor = _vector(gate, batch, frame, cols, inside).to(element).to(tl.float32)
    if FLAGS & 4 != 0:
        factor_dot = _vector(gate_dot, batch, frame, cols, inside).to(element).to(tl.float32)
    for token in range(start, stop):
        value = _token(y, batch, frame, token, cols, inside)
        place = (group * tokens + token) * WIDTH + cols
        out = _token(x, batch, frame, token, cols, inside) + factor * value
        tl.store(out_ptr + place, out.to(element), mask=inside)
        if FLAGS != 0:
            out_dot = tl.zeros_like(out)
            if FLAGS & 1 != 0:
                out_dot += _token(x_dot, batch, frame, token, cols, inside)
            if FLAGS & 2 != 0:
                out_dot += factor * _token(y_dot, batch, frame, token, cols, inside)
            if FLAGS & 4 != 0:
                out_dot += factor_dot * value
            tl.store(out_dot_ptr + place, out_dot.to(element), mask=inside)


@triton.jit(do_not_specialize=["frames", "tokens"])
def gated_add_backward(
    y, gate, grad_out, grad_y_ptr, gate_parts_ptr, frames, tokens,
    NEEDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_y = gate * grad, contiguous, and this program's sum of grad * y over its tokens. NEEDS:
    1, 2 for y, gate.
    """
    batch, frame, start, stop, group, program, cols, inside = _place(
        frames, tokens, ROWS, WIDTH, BLOCK
    )
    element: tl.constexpr = grad_y_ptr.dtype.element_ty
    factor = _vector(gate, batch, frame, cols, inside).to(element).to(tl.float32)
    gate_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for token in range(start, stop):
        grad = _token(grad_out, batch, frame, token, cols, inside)
        if NEEDS & 1 != 0:
            tl.store(
                grad_y_ptr + (group * tokens + token) * WIDTH + cols,
                (factor * grad).to(element),
                mask=inside,
            )
        if NEEDS & 2 != 0:
            gate_sum += grad * _token(y, batch, frame, token, cols, inside)
    if NEEDS & 2 != 0:
        tl.store(gate_parts_ptr + program * WIDTH + cols, gate_sum, mask=inside)


@triton.jit
def _gelu(x):
    """x * s and its derivative, s = sigmoid(2 u) = (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715
    x^3).
    """
    square = x * x
    s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * square)))
    slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    return x * s, slope


@triton.jit
def gelu_forward(
    x_ptr, x_dot_ptr, y_ptr, y_dot_ptr, size, HAS_DOT: tl.constexpr, BLOCK: tl.constexpr
):
    """y = gelu(x) and, with HAS_DOT, y_dot = gelu'(x) x_dot; contiguous."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    y, slope = _gelu(tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32))
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    if HAS_DOT:
        x_dot = tl.load(x_dot_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_dot_ptr + place, (slope * x_dot).to(y_dot_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(x_ptr, grad_y_ptr, grad_x_ptr, size, BLOCK: tl.constexpr):
    """grad_x = gelu'(x) grad_y; contiguous."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    y, slope = _gelu(tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32))
    grad = tl.load(grad_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + place, (slope * grad).to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_sums(
    x_ptr, grad_y_ptr, grad_x_ptr, parts_ptr, rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x = gelu'(x) grad_y [rows, WIDTH], contiguous, and its sums over the ROWS rows of this
    program, BLOCK channels of them.
    """
    program = tl.program_id(0).to(tl.int64)
    start = program * ROWS
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(start, tl.minimum(start + ROWS, rows)):
        place = row * WIDTH + cols
        y, slope = _gelu(tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32))
        grad = tl.load(grad_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total += slope * grad
        tl.store(grad_x_ptr + place, (slope * grad).to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(parts_ptr + program * WIDTH + cols, total, mask=inside)


@triton.jit
def _turn(
    described, out_ptr, out_place, batch, head, rows, cols, inside, cos, sin,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotate the [TOKENS, 2 PAIRS] tile of one head."""
    ptr, stride_b, stride_l, stride_n = described
    x = tl.load(
        ptr + batch * stride_b + rows[:, None] * stride_l + head * stride_n + cols[None, :],
        mask=inside,
        other=0.0,
    )
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [TOKENS, PAIRS, 2]))
    out = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [TOKENS, 2 * PAIRS])
    tl.store(out_ptr + out_place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "heads"])
def rotate_pairs(
    x, x_dot, cos_ptr, sin_ptr, out_ptr, out_dot_ptr, length, heads,
    HAS_DOT: tl.constexpr, BACKWARDS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotate pairs (2j, 2j+1) of every head by the angle of (token, j), or by minus that angle; out
    [B, L, N, D] is contiguous.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = (length + TOKENS - 1) // TOKENS
    batch = program // tiles
    rows = (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, 2 * PAIRS)
    pairs = tl.arange(0, PAIRS)
    inside = (rows < length)[:, None] & (cols < WIDTH)[None, :]
    table = rows[:, None] * (WIDTH // 2) + pairs[None, :]
    known = (rows < length)[:, None] & (pairs < WIDTH // 2)[None, :]
    cos = tl.load(cos_ptr + table, mask=known, other=0.0)
    sin = tl.load(sin_ptr + table, mask=known, other=0.0)
    if BACKWARDS:
        sin = -sin
    for head in range(heads):
        place = ((batch * length + rows[:, None]) * heads + head) * WIDTH + cols[None, :]
        _turn(x, out_ptr, place, batch, head, rows, cols, inside, cos, sin, TOKENS, PAIRS)
        if HAS_DOT:
            _turn(
                x_dot, out_dot_ptr, place, batch, head, rows, cols, inside, cos, sin, TOKENS, PAIRS
            )
