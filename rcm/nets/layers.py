"""Layers of the Wan transformer. Each operator is a module, so that the tangent guard can see it; statistics, time and modulation run
in float32.

Tokens are [B, F, S, E]: frames F, tokens per frame S, width E. Modulation vectors are [B, F or 1, 1, E], so that per-frame times are a
broadcast. Reduced precision: activations and residual stream in the dtype of the input, everything named above in `accumulate_dtype`
of it. spec/wan.md 1.3, 1.5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.dual import has_tangent


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


class PromotedLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever the dtype of its weights (float32 arithmetic on bf16 weights)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features], dtype of `x`."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x` [..., dim], same dtype. A dual `x` takes the written-out formula: the fused one has no tangent everywhere."""
        if not has_tangent(x):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.to(accumulate_dtype(x.dtype))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)


class AffineLayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias; statistics in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x` [..., dim], same dtype. A dual `x` is widened first: torch returns float32 tangents of reduced-precision norms."""
        if not has_tangent(x):
            return super().forward(x)
        wide = x.to(accumulate_dtype(x.dtype))
        affine = (self.weight.to(wide.dtype), self.bias.to(wide.dtype))
        return F.layer_norm(wide, self.normalized_shape, *affine, self.eps).to(x.dtype)


class ModulatedNorm(nn.Module):
    """Layer norm without parameters, then `* (1 + scale) + shift` in float32: the adaptive norm of a DiT."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """`x` [B, F, S, E]; `shift`, `scale` [B, F or 1, 1, E] float32 or wider. Returns the dtype of `shift`."""
        return torch.addcmul(shift, F.layer_norm(x, (self.dim,), None, None, self.eps), 1 + scale)


class GatedAdd(nn.Module):
    """x + gate * y, in the dtype of the residual stream."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """`x`, `y` [B, F, S, E] of one dtype, `gate` [B, F or 1, 1, E]."""
        return torch.addcmul(x, y, gate.to(x.dtype))


class Sinusoid(nn.Module):
    """cos and sin of `timestep * 10000^(-j / half)`, j < half = dim / 2, cosines first; computed in float64."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.half = dim // 2

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """`timestep` [B, F] on the 0..1000 scale to [B, F, dim] in `dtype`."""
        j = torch.arange(self.half, dtype=torch.float64, device=timestep.device)
        angle = timestep.double()[..., None] * torch.pow(10000.0, -j / self.half)
        return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


class Patchify(nn.Module):
    """Cut frames into patches of (rows, columns); features of a patch run channel, row, column (the order of a flattened convolution
    weight).
    """

    def __init__(self, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, C, F, H, W] to [B, F, S, C * rows * columns], S = (H / rows) (W / columns), row-major."""
        rows, columns = self.patch
        cut = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))
        return cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


class Unpatchify(nn.Module):
    """Put patches together; features of a patch run row, column, channel (the reverse of `Patchify`, as in the released weights)."""

    def __init__(self, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`x` [B, F, S, rows * columns * C] with S = h * w of `grid` to [B, C, F, H, W]."""
        rows, columns = self.patch
        cut = x.unflatten(3, (rows, columns, -1)).unflatten(2, grid)
        return cut.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
