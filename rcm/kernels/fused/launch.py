"""From tensors to kernel launches of the fused layers: views, outputs, grids. Nothing here knows
autograd or dual tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcm.kernels import precompile
from rcm.kernels.fused import norm_kernels, pointwise_kernels
from rcm.kernels.launching import device_of, power_of_2

ROWS_FORWARD, ROWS_BACKWARD = 8, 32
"""Tokens per program: enough to use a loaded gain more than once, and, backward, to keep the
partial sums small.
"""
POINTWISE_BLOCK = 2048
SUMMED_ROWS, SUMMED_BLOCK = 64, 1024
"""Rows and channels of a program that adds up columns, too: 16 bytes per access, partial sums a
thirtieth of what it reads."""
TABLE_ELEMENTS = 1024
"""Channel pairs whose cosines and sines one rotation program holds."""


class NormKind(NamedTuple):
    """Which norm: subtract the mean or not, what is added to the gain, and the epsilon inside the
    root.
    """

    center: bool
    offset: float
    eps: float


def _divided(count: int, by: int) -> int:
    return -(-count // by)


def as_rows(x: Tensor) -> Tensor:
    """`x` [.., E] of 1 to 4 dimensions as a view [B, F, S, E] with unit stride over channels (a
    copy only where that stride is not 1).
    """
    if x.dim() != 4:
        if not 1 <= x.dim() <= 4:
            raise ValueError(f"fused layers take 1 to 4 dimensions, got {tuple(x.shape)}")
        x = x[(None,) * (4 - x.dim())]
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor from `as_rows` and its strides over batch, frames, tokens."""
    batch, frame, token, _ = x.stride()
    return x, batch, frame, token


def _vectors(v: Tensor, rows: Tensor, *, name: str) -> tuple[Tensor, int, int]:
    """`v` [E] or [B or 1, F or 1, 1, E] and its strides over batch and frames, 0 where one vector
    serves all.
    """
    batch, frames, _, width = rows.shape
    if v.dim() == 1 and v.shape[0] == width:
        return (v if v.stride(0) == 1 or width == 1 else v.contiguous()), 0, 0
    if (
        v.dim() != 4
        or v.shape[0] not in (1, batch)
        or v.shape[1] not in (1, frames)
        or v.shape[2] != 1
        or v.shape[3] != width
    ):
        raise ValueError(
            f"{name} must be [E] or [B or 1, F or 1, 1, E] for rows {tuple(rows.shape)}, got"
            f" {tuple(v.shape)}"
        )
    v = v if v.stride(3) == 1 or width == 1 else v.contiguous()
    return v, v.stride(0) if v.shape[0] > 1 else 0, v.stride(1) if v.shape[1] > 1 else 0


def _tangent_rows(x_dot: Tensor | None, x: Tensor) -> tuple[Tensor, int, int, int]:
    return _rows(x if x_dot is None else as_rows(x_dot))


def _tangent_vectors(
    v_dot: Tensor | None, v: tuple[Tensor, int, int], rows: Tensor
) -> tuple[Tensor, int, int]:
    return v if v_dot is None else _vectors(v_dot, rows, name="tangent")


def _flags(*tangents: Tensor | None) -> int:
    return sum(1 << bit for bit, tangent in enumerate(tangents) if tangent is not None)


def _cut(rows: Tensor, tokens_per_program: int) -> tuple[tuple[int], dict]:
    """Grid and sizes of a row kernel."""
    batch, frames, tokens, width = rows.shape
    block = power_of_2(width)
    grid = (batch * frames * _divided(tokens, tokens_per_program),)
    return grid, {
        "ROWS": tokens_per_program,
        "WIDTH": width,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 1024)),
    }


def _folded(parts: Tensor, rows: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """Partial sums [programs, E] added up to the shape of the vectors they belong to, in a fixed
    order.
    """
    batch, frames, _, width = rows.shape
    shape, dtype = like
    return (
        parts.view(batch, frames, -1, width).sum(dim=2, keepdim=True).sum_to_size(shape).to(dtype)
    )


def norm(
    x: Tensor, gain: Tensor, shift: Tensor | None, *, kind: NormKind, dtype: torch.dtype
) -> Tensor:
    """n(x) * (offset + gain) + shift in `dtype`, contiguous, in the shape of `x`."""
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not x.numel():
        return y
    gain = _vectors(gain, rows, name="gain")
    added = gain if shift is None else _vectors(shift, rows, name="shift")
    grid, sizes = _cut(rows, ROWS_FORWARD)
    operands = (_rows(rows), gain, added, y, rows.shape[1], rows.shape[2], kind.eps)
    options = {"CENTER": kind.center, "OFFSET": kind.offset, "HAS_SHIFT": shift is not None}
    with device_of(x):
        precompile.launch(norm_kernels.norm_forward, grid, *operands, **options, **sizes)
    return y


def norm_tangent(
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    kind: NormKind,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`norm` and its tangent along the tangents of x, gain and shift, at least one of which is
    given.
    """
    rows = as_rows(x)
    # no views: packing a dual would copy those
    y, y_dot = (torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))
    if not x.numel():
        return y, y_dot
    gain = _vectors(gain, rows, name="gain")
    added = gain if shift is None else _vectors(shift, rows, name="shift")
    grid, sizes = _cut(rows, ROWS_FORWARD)
    x_dot, gain_dot, shift_dot = tangents
    with device_of(x):
        norm_kernels.norm_tangent[grid](
            _rows(rows), _tangent_rows(x_dot, rows), gain, _tangent_vectors(gain_dot, gain, rows),
            added, _tangent_vectors(shift_dot, added, rows), y, y_dot, rows.shape[1], rows.shape[2],
            kind.eps,
            CENTER=kind.center, OFFSET=kind.offset, HAS_SHIFT=shift is not None,
            FLAGS=_flags(*tangents), **sizes,
        )  # fmt: skip
    return y, y_dot


def norm_backward(
    x: Tensor,
    gain: Tensor,
    grad_y: Tensor,
    *,
    kind: NormKind,
    needs: tuple[bool, bool, bool],
    gain_like: tuple[torch.Size, torch.dtype],
    shift_like: tuple[torch.Size, torch.dtype] | None,
    carried: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, gain and shift, where `needs` says so; sums over tokens in float32 and in a
    fixed order. `carried`: the gradient of x from elsewhere, which that of x includes.
    """
    rows, grad = as_rows(x), as_rows(grad_y)
    if not x.numel():
        sums = (
            None if like is None else torch.zeros(like[0], dtype=like[1], device=x.device)
            for like in (gain_like, shift_like)
        )
        return torch.zeros_like(x) if carried is None else carried, *sums
    vectors = _vectors(gain, rows, name="gain")
    grid, sizes = _cut(rows, ROWS_BACKWARD)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    parts = [
        torch.empty(grid[0], x.shape[-1], dtype=torch.float32, device=x.device) if need else None
        for need in needs[1:]
    ]
    with device_of(x):
        norm_kernels.norm_backward[grid](
            _rows(rows), vectors, _rows(grad), _tangent_rows(carried, rows),
            x if grad_x is None else grad_x,
            *(x if part is None else part for part in parts), rows.shape[1], rows.shape[2],
            kind.eps,
            CENTER=kind.center, OFFSET=kind.offset,
            NEEDS=sum(1 << bit for bit, need in enumerate(needs) if need),
            CARRIED=carried is not None, **sizes,
        )  # fmt: skip
    gain_grad, shift_grad = (
        None if part is None else _folded(part, rows, like)
        for part, like in zip(parts, (gain_like, shift_like), strict=True)
    )
    return grad_x, gain_grad, shift_grad


def gated_add(
    x: Tensor, y: Tensor, gate: Tensor, tangents: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """x + gate * y and its tangent (None if no tangent is given), contiguous."""
    rows, values = as_rows(x), as_rows(y)
    flags = _flags(*tangents)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_dot = torch.empty_like(out) if flags else None
    if not x.numel():
        return out, out_dot
    vectors = _vectors(gate, rows, name="gate")
    grid, sizes = _cut(rows, ROWS_FORWARD)
    x_dot, y_dot, gate_dot = tangents
    with device_of(x):
        precompile.launch(
            pointwise_kernels.gated_add_forward, grid, _rows(rows), _tangent_rows(x_dot, rows),
            _rows(values), _tangent_rows(y_dot, values), vectors,
            _tangent_vectors(gate_dot, vectors, rows), out, out if out_dot is None else out_dot,
            rows.shape[1], rows.shape[2],
            FLAGS=flags, **sizes,
        )  # fmt: skip
    return out, out_dot


def gated_add_backward(
    y: Tensor,
    gate: Tensor,
    grad_out: Tensor,
    *,
    needs: tuple[bool, bool],
    gate_like: tuple[torch.Size, torch.dtype],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of y and gate, where `needs` says so."""
    rows, grad = as_rows(y), as_rows(grad_out)
    if not y.numel():
        return torch.zeros_like(y), torch.zeros(gate_like[0], dtype=gate_like[1], device=y.device)
    grid, sizes = _cut(rows, ROWS_BACKWARD)
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device) if needs[0] else None
    parts = (
        torch.empty(grid[0], y.shape[-1], dtype=torch.float32, device=y.device)
        if needs[1]
        else None
    )
    with device_of(y):
        pointwise_kernels.gated_add_backward[grid](
            _rows(rows), _vectors(gate, rows, name="gate"), _rows(grad),
            y if grad_y is None else grad_y, y if parts is None else parts, rows.shape[1],
            rows.shape[2],
            NEEDS=needs[0] + 2 * needs[1], **sizes,
        )  # fmt: skip
    return grad_y, None if parts is None else _folded(parts, rows, gate_like)


def gelu(x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """gelu(x), tanh form, and gelu'(x) x_dot (None without x_dot)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    y_dot = None if x_dot is None else torch.empty_like(x)
    moved, target = (x, y) if x_dot is None else (x_dot.contiguous(), y_dot)
    grid = (_divided(x.numel(), POINTWISE_BLOCK),)
    if x.numel():
        with device_of(x):
            options = {"HAS_DOT": x_dot is not None, "BLOCK": POINTWISE_BLOCK, "num_warps": 8}
            precompile.launch(
                pointwise_kernels.gelu_forward, grid, x, moved, y, target, x.numel(), **options
            )
    return y, y_dot


def gelu_backward(x: Tensor, grad_y: Tensor) -> Tensor:
    """gelu'(x) grad_y."""
    x, grad_y = x.contiguous(), grad_y.contiguous()
    grad_x = torch.empty_like(x)
    grid = (_divided(x.numel(), POINTWISE_BLOCK),)
    if x.numel():
        with device_of(x):
            pointwise_kernels.gelu_backward[grid](
                x, grad_y, grad_x, x.numel(), BLOCK=POINTWISE_BLOCK, num_warps=8
            )
    return grad_x


def gelu_backward_sums(x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """gelu'(x) grad_y, and its sum over all rows [E] in float32 and in a fixed order."""
    x, grad_y = x.contiguous(), grad_y.contiguous()
    width = x.shape[-1]
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros(width, device=x.device)
    rows = x.numel() // width
    grid = (_divided(rows, SUMMED_ROWS), _divided(width, SUMMED_BLOCK))
    parts = torch.empty(grid[0], width, dtype=torch.float32, device=x.device)
    with device_of(x):
        pointwise_kernels.gelu_backward_sums[grid](
            x, grad_y, grad_x, parts, rows,
            ROWS=SUMMED_ROWS, WIDTH=width, BLOCK=SUMMED_BLOCK, num_warps=4,
        )  # fmt: skip
    return grad_x, parts.sum(dim=0)


def rotate(
    x: Tensor, x_dot: Tensor | None, cos: Tensor, sin: Tensor, *, backwards: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Channel pairs of `x` [B, L, N, D] (and of `x_dot`) turned by the angles whose `cos`, `sin`
    are [L, D / 2] float32, or back.
    """
    batch, length, heads, width = x.shape
    rows = as_rows(x)
    moved = rows if x_dot is None else as_rows(x_dot)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_dot = None if x_dot is None else torch.empty_like(out)
    pairs = power_of_2(width) // 2
    tokens = max(1, TABLE_ELEMENTS // pairs)
    if x.numel():
        with device_of(x):
            precompile.launch(
                pointwise_kernels.rotate_pairs, (batch * _divided(length, tokens),), _rows(rows),
                _rows(moved), cos, sin, out, out if out_dot is None else out_dot, length, heads,
                HAS_DOT=x_dot is not None, BACKWARDS=backwards, TOKENS=tokens, WIDTH=width,
                PAIRS=pairs, num_warps=4,
            )  # fmt: skip
    return out, out_dot
