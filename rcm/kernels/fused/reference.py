"""The plain formulas of the fused layers: any device and dtype, differentiable both ways; what runs
where the kernels do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.core.dual import has_tangent


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift; the norm is rounded to the dtype of `x`, the result has
    that of `shift`.
    """
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), None, None, eps), 1 + scale)


def affine_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias. Duals are widened first: torch returns float32 tangents of
    reduced-precision norms.
    """
    if not any(map(has_tangent, (x, weight, bias))):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = x.to(accumulate_dtype(x.dtype))
    return F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps).to(
        x.dtype
    )


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. Duals take the written-out formula: the fused one has no
    tangent everywhere.
    """
    if not (has_tangent(x) or has_tangent(weight)):
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(accumulate_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y with the gate rounded to the dtype of `x`."""
    return torch.addcmul(x, y, gate.to(x.dtype))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel pairs of `x` [B, L, N, D] turned; `cos`, `sin` [L, 1, D], the sine of even channels
    with the sign of the rotation.
    """
    swapped = x.unflatten(3, (-1, 2)).flip(4).flatten(3)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
