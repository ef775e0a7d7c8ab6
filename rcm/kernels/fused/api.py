"""Fused layers as functions of plain or dual tensors: one launch forward, one for value and tangent
together, one backward.

Every function takes any strides, computes in float32, and knows three uses. Plain tensors without
gradient: one kernel. Plain tensors with gradient: an autograd Function whose backward is one kernel
(and a sum of partial sums for parameters, in a fixed order). Dual tensors: value and tangent in one
kernel, each input with or without a tangent; the tangent is a constant of the loss, so a dual input
that also needs a gradient raises. The plain formulas are in `reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcm.core.dual import in_dual_level, pack, unpack
from rcm.kernels.fused import launch
from rcm.kernels.fused.launch import Like, NormKind


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without intermediate rounding.

    `x` [B, F, S, E]; `shift`, `scale` [B or 1, F or 1, 1, E] any float dtype. Returns `dtype`.
    docs/reference/wan.md#forward.
    """
    return carried_modulated_norm(x, shift, scale, eps=eps, dtype=dtype)[1]


def carried_modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`x`, to go on with, and its `modulated_norm`: gradients of both arrive in one kernel, which
    adds them.
    """
    return _norm(x, scale, shift, NormKind(center=True, offset=1.0, eps=eps), dtype)


def affine_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias for `x` [.., E], `weight`, `bias` [E]; dtype of `x`."""
    return carried_affine_norm(x, weight, bias, eps=eps)[1]


def carried_affine_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """`x`, to go on with, and its `affine_norm`, as `carried_modulated_norm`."""
    return _norm(x, weight, bias, NormKind(center=True, offset=0.0, eps=eps), x.dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for `x` [.., E], `weight` [E]; dtype of `x`."""
    return _norm(x, weight, None, NormKind(center=False, offset=0.0, eps=eps), x.dtype)[1]


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y with the gate rounded to the dtype of `x`, `y` [B, F, S, E]; `gate` [B or 1, F
    or 1, 1, E].
    """
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(
            f"a gated add needs one shape and dtype, got {tuple(x.shape)} {x.dtype} and"
            f" {tuple(y.shape)} {y.dtype}"
        )
    (x, y, gate), (x_dot, y_dot, gate_dot) = _split(x, y, gate)
    if _graph(x, y, gate):
        return _GatedAdd.apply(x, y, gate)
    out, out_dot = launch.gated_add(x, y, gate, (x_dot, y_dot, gate_dot))
    return pack(out, out_dot)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form; shape and dtype of `x`."""
    (x,), (x_dot,) = _split(x)
    return _Gelu.apply(x) if _graph(x) else pack(*launch.gelu(x, x_dot))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(x weight^T + bias); the kernel of GELU's gradient adds up that of the bias."""
    if in_dual_level() or not _graph(x, weight, bias):
        return gelu_tanh(F.linear(x, weight, bias))
    return _LinearGelu.apply(x, weight, bias)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel pairs (2j, 2j+1) of `x` [B, L, N, D] turned by angles given as `cos`, `sin` [L, D /
    2], float32 and contiguous.
    """
    (x,), (x_dot,) = _split(x)
    return _Rotate.apply(x, cos, sin) if _graph(x) else pack(*launch.rotate(x, x_dot, cos, sin))


def _split(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Primals and tangents. Raises `RuntimeError` for a tangent together with a gradient."""
    if not in_dual_level():
        return tensors, (None,) * len(tensors)
    primals, tangents = zip(*map(unpack, tensors), strict=True)
    moving = [t for t in tangents if t is not None]
    if moving and _graph(*primals, *moving):
        raise RuntimeError(
            "fused layers give a tangent that is a constant: run the tangent pass under no_grad, or"
            " set fused_layers=off"
        )
    return primals, tangents


def _graph(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _like(x: Tensor) -> Like:
    return x.shape, x.dtype


def _norm(
    x: Tensor, gain: Tensor, shift: Tensor | None, kind: NormKind, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    given = (x, gain) if shift is None else (x, gain, shift)
    (rows, gain, *rest), (x_dot, gain_dot, *rest_dot) = _split(*given)
    shift, shift_dot = (rest[0], rest_dot[0]) if rest else (None, None)
    if _graph(rows, gain, *rest):
        return _Norm.apply(rows, gain, shift, kind, dtype)
    tangents = (x_dot, gain_dot, shift_dot)
    if all(t is None for t in tangents):
        return x, launch.norm(rows, gain, shift, kind=kind, dtype=dtype)
    return x, pack(*launch.norm_tangent(rows, gain, shift, tangents, kind=kind, dtype=dtype))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor | None, kind: NormKind, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, gain)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.shift_like = kind, None if shift is None else _like(shift)
        return x, launch.norm(x, gain, shift, kind=kind, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, carried: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return carried, None, None, None, None
        x, gain = ctx.saved_tensors
        grads = launch.norm_backward(
            x, gain, grad, kind=ctx.kind, needs=ctx.needs_input_grad[:3],
            gain_like=_like(gain), shift_like=ctx.shift_like, carried=carried,
        )  # fmt: skip
        return *grads, None, None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, gate)
        return launch.gated_add(x, y, gate, (None, None, None))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        y, gate = ctx.saved_tensors
        return grad, *launch.gated_add_backward(
            y, gate, grad, needs=ctx.needs_input_grad[1:], gate_like=_like(gate)
        )


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return launch.gelu(x, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return launch.gelu_backward(x, grad)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        grown = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, grown)
        return launch.gelu(grown, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        x, weight, grown = ctx.saved_tensors
        grad, bias_grad = launch.gelu_backward_sums(grown, grad)
        rows, needs = grad.flatten(0, -2), ctx.needs_input_grad
        x_grad = (rows @ weight).view(x.shape) if needs[0] else None
        weight_grad = rows.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        return x_grad, weight_grad, bias_grad.to(weight.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return launch.rotate(x, None, cos, sin)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return launch.rotate(grad, None, *ctx.saved_tensors, backwards=True)[0], None, None
