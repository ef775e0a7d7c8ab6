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
Rows = tuple[Tensor, int, int, int]
"""What a kernel reads as rows [B, F, S, E] of unit last stride, and its other strides."""
Vectors = tuple[Tensor, int, int]
"""Vectors [E] per batch entry and frame, and their strides; 0 where one serves all."""
Like = tuple[torch.Size, torch.dtype]
"""What a gradient is to look like."""
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]
"""One per tensor that a layer takes; None: a structural zero."""


class NormKind(NamedTuple):
    """Which norm: subtract the mean or not, what is added to the gain, and the epsilon inside the
    root.
    """

    center: bool
    offset: float
    eps: float


def as_rows(x: Tensor) -> Tensor:
    """`x` [.., E] of 1 to 4 dimensions as a view [B, F, S, E] with unit stride over channels (a
    copy only where that stride is not 1).
    """
    if x.dim() != 4:
        if not 1 <= x.dim() <= 4:
            raise ValueError(f"fused layers take 1 to 4 dimensions, got {tuple(x.shape)}")
        x = x[(None,) * (4 - x.dim())]
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _rows(x: Tensor) -> Rows:
    """A tensor from `as_rows`, described."""
    batch, frame, token, _ = x.stride()
    return x, batch, frame, token


def _vectors(v: Tensor, rows: Tensor, *, name: str) -> Vectors:
    """`v` [E] or [B or 1, F or 1, 1, E], described; `ValueError` for another shape."""
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


def _tangent_rows(x_dot: Tensor | None, x: Tensor) -> Rows:
    return _rows(x if x_dot is None else as_rows(x_dot))


def _tangent_vectors(v_dot: Tensor | None, v: Vectors, rows: Tensor) -> Vectors:
    return v if v_dot is None else _vectors(v_dot, rows, name="tangent")


def _flags(*tangents: Tensor | None) -> int:
    return sum(1 << bit for bit, tangent in enumerate(tangents) if tangent is not None)


def _cut(rows: Tensor, tokens_per_program: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sizes of a row kernel."""
    batch, frames, tokens, width = rows.shape
    block = power_of_2(width)
    grid = (batch * frames * -(-tokens // tokens_per_program),)
    return grid, {
        "ROWS": tokens_per_program,
        "WIDTH": width,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 1024)),
    }


def _folded(parts: Tensor | None, rows: Tensor, like: Like | None) -> Tensor | None:
    """Partial sums [programs, E] added up to the shape of the vectors they belong to, in a fixed
    order.
    """
    if parts is None or like is None:
        return None
    batch, frames, _, width = rows.shape
    shape, dtype = like
    return (
        parts.view(batch, frames, -1, width).sum(dim=2, keepdim=True).sum_to_size(shape).to(dtype)
    )


def _parts(grid: tuple[int, ...], x: Tensor) -> Tensor:
    """Room for the sums over tokens of every program: float32 [programs, E]."""
    return torch.empty(grid[0], x.shape[-1], dtype=torch.float32, device=x.device)


def _nothing(like: Like, x: Tensor) -> Tensor:
    """The gradient of a vector that met no token."""
    return torch.zeros(like[0], dtype=like[1], device=x.device)


def _or(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """`tensors`, a stand-in for the absent ones, which a kernel does not touch."""
    return [stand_in if x is None else x for x in tensors]


def norm(
    x: Tensor, gain: Tensor, shift: Tensor | None, *, kind: NormKind, dtype: torch.dtype
) -> Tensor:
    """n(x) * (offset + gain) + shift in `dtype`, contiguous, in the shape of `x`."""
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not x.numel():
        return y
    gains = _vectors(gain, rows, name="gain")
    added = gains if shift is None else _vectors(shift, rows, name="shift")
    grid, sizes = _cut(rows, ROWS_FORWARD)
    operands = (_rows(rows), gains, added, y, rows.shape[1], rows.shape[2], kind.eps)
    options = {"CENTER": kind.center, "OFFSET": kind.offset, "HAS_SHIFT": shift is not None}
    with device_of(x):
        precompile.launch(norm_kernels.norm_forward, grid, *operands, **options, **sizes)
    return y


def norm_tangent(
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    tangents: Tangents,
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
    gains = _vectors(gain, rows, name="gain")
    added = gains if shift is None else _vectors(shift, rows, name="shift")
    grid, sizes = _cut(rows, ROWS_FORWARD)
    x_dot, gain_dot, shift_dot = tangents
    with device_of(x):
        norm_kernels.norm_tangent[grid](
            _rows(rows), _tangent_rows(x_dot, rows), gains, _tangent_vectors(gain_dot, gains, rows),
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
    gain_like: Like,
    shift_like: Like | None,
    carried: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, gain and shift, where `needs` says so; sums over tokens in float32 and in a
    fixed order. `carried`: the gradient of x from elsewhere, which that of x includes.
    """
    rows, grad = as_rows(x), as_rows(grad_y)
    if not x.numel():
        gain_grad = _nothing(gain_like, x)
        shift_grad = None if shift_like is None else _nothing(shift_like, x)
        return torch.zeros_like(x) if carried is None else carried, gain_grad, shift_grad
    grid, sizes = _cut(rows, ROWS_BACKWARD)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    gain_parts, shift_parts = (_parts(grid, x) if need else None for need in needs[1:])
    with device_of(x):
        norm_kernels.norm_backward[grid](
            _rows(rows), _vectors(gain, rows, name="gain"), _rows(grad),
            _tangent_rows(carried, rows), *_or(x, grad_x, gain_parts, shift_parts),
            rows.shape[1], rows.shape[2], kind.eps,
            CENTER=kind.center, OFFSET=kind.offset,
            NEEDS=sum(1 << bit for bit, need in enumerate(needs) if need),
            CARRIED=carried is not None, **sizes,
        )  # fmt: skip
    return grad_x, _folded(gain_parts, rows, gain_like), _folded(shift_parts, rows, shift_like)


def gated_add(
    x: Tensor, y: Tensor, gate: Tensor, tangents: Tangents
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
            _tangent_vectors(gate_dot, vectors, rows), out, *_or(out, out_dot),
            rows.shape[1], rows.shape[2],
            FLAGS=flags, **sizes,
        )  # fmt: skip
    return out, out_dot


def gated_add_backward(
    y: Tensor, gate: Tensor, grad_out: Tensor, *, needs: tuple[bool, bool], gate_like: Like
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of y and gate, where `needs` says so."""
    rows, grad = as_rows(y), as_rows(grad_out)
    if not y.numel():
        return torch.zeros_like(y), _nothing(gate_like, y)
    grid, sizes = _cut(rows, ROWS_BACKWARD)
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device) if needs[0] else None
    parts = _parts(grid, y) if needs[1] else None
    with device_of(y):
        pointwise_kernels.gated_add_backward[grid](
            _rows(rows), _vectors(gate, rows, name="gate"), _rows(grad),
            *_or(y, grad_y, parts), rows.shape[1], rows.shape[2],
            NEEDS=needs[0] + 2 * needs[1], **sizes,
        )  # fmt: skip
    return grad_y, _folded(parts, rows, gate_like)


def gelu(x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """gelu(x), tanh form, and gelu'(x) x_dot (None without x_dot)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    y_dot = None if x_dot is None else torch.empty_like(x)
    moved = x if x_dot is None else x_dot.contiguous()
    grid = (-(-x.numel() // POINTWISE_BLOCK),)
    if x.numel():
        with device_of(x):
            options = {"HAS_DOT": x_dot is not None, "BLOCK": POINTWISE_BLOCK, "num_warps": 8}
            precompile.launch(
                pointwise_kernels.gelu_forward, grid, x, moved, y, *_or(y, y_dot), x.numel(),
                **options,
            )  # fmt: skip
    return y, y_dot


def gelu_backward(x: Tensor, grad_y: Tensor) -> Tensor:
    """gelu'(x) grad_y."""
    x, grad_y = x.contiguous(), grad_y.contiguous()
    grad_x = torch.empty_like(x)
    grid = (-(-x.numel() // POINTWISE_BLOCK),)
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
    grid = (-(-rows // SUMMED_ROWS), -(-width // SUMMED_BLOCK))
    parts = _parts(grid, x)
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
                pointwise_kernels.rotate_pairs, (batch * -(-length // tokens),), _rows(rows),
                _rows(moved), cos, sin, out, *_or(out, out_dot), length, heads,
                HAS_DOT=x_dot is not None, BACKWARDS=backwards, TOKENS=tokens, WIDTH=width,
                PAIRS=pairs, num_warps=4,
            )  # fmt: skip
    return out, out_dot
