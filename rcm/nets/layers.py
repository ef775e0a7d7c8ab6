"""Layers of the Wan transformer. Each operator is a module, so that the tangent guard can see it;
statistics, time and modulation run in float32.

Tokens are [B, F, S, E]: frames F, tokens per frame S, width E. Modulation vectors are [B, F or 1,
1, E], so that per-frame times are a broadcast. Reduced precision: activations and residual stream
in the dtype of the input, everything named above in `accumulate_dtype` of it.
docs/reference/wan.md#forward, #precision.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.dual import has_tangent, in_dual_level, pack, unpack
from rcm.kernels.fused import choice, reference

accumulate_dtype = reference.accumulate_dtype


class FusedLayer(nn.Module):
    """A layer with a fused kernel; `fused` is "auto", "on" or "off" (`choice.use_fused`)."""

    fused = "auto"

    def runs_fused(self, x: Tensor) -> bool:
        """Whether the kernel serves `x` [.., E]; `ConfigError` if demanded and impossible."""
        return choice.use_fused(self.fused, x, width=x.shape[-1])


class Linear(nn.Linear):
    """A linear layer whose tangent is one matrix product: torch's own adds zero tangents of weight
    and bias in passes over memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features]; plain or dual."""
        primal, tangent = unpack(x)
        dual_bias = self.bias is not None and has_tangent(self.bias)
        if tangent is None or has_tangent(self.weight) or dual_bias:
            return super().forward(x)
        return pack(super().forward(primal), F.linear(tangent, self.weight))


class PromotedLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever the dtype of its weights
    (float32 arithmetic on bf16 weights).
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features], dtype of `x`."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class RMSNorm(FusedLayer):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        kernels = _kernels() if self.runs_fused(x) else reference
        return kernels.rms_norm(x, self.weight, eps=self.eps)


class AffineLayerNorm(nn.LayerNorm, FusedLayer):
    """Layer norm with weight and bias; statistics in float32."""

    def forward(self, x: Tensor, *, carry: bool = False) -> Any:
        """Normalised `x` [..., dim], same dtype; `carry` as in `ModulatedNorm`."""
        if self.runs_fused(x):
            pair = _kernels().carried_affine_norm(x, self.weight, self.bias, eps=self.eps)
        else:
            pair = x, reference.affine_norm(x, self.weight, self.bias, eps=self.eps)
        return pair if carry else pair[1]


class ModulatedNorm(FusedLayer):
    """Adaptive norm of a DiT: plain layer norm, then `* (1 + scale) + shift` in float32."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        *,
        dtype: torch.dtype | None = None,
        carry: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`x` [B, F, S, E]; `shift`, `scale` [B, F or 1, 1, E] float32 or wider. Returns `dtype`,
        by default that of `shift`. `carry`: `x`, to go on with, before the result, so that a kernel
        can add the gradients of both.
        """
        dtype = shift.dtype if dtype is None else dtype
        if self.runs_fused(x):
            pair = _kernels().carried_modulated_norm(x, shift, scale, eps=self.eps, dtype=dtype)
        else:
            pair = x, reference.modulated_norm(x, shift, scale, eps=self.eps).to(dtype)
        return pair if carry else pair[1]


class GatedAdd(FusedLayer):
    """x + gate * y, in the dtype of the residual stream."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """`x`, `y` [B, F, S, E] of one dtype, `gate` [B, F or 1, 1, E]."""
        kernels = _kernels() if self.runs_fused(x) else reference
        return kernels.gated_add(x, y, gate)


class Gelu(FusedLayer):
    """GELU in its tanh form."""

    def joins_product(self, x: Tensor) -> bool:
        """Whether the product before may compute it: while a CUDA graph of 16-bit passes is
        captured.
        """
        return (
            self.fused == "on"
            and x.is_cuda
            and x.dtype in (torch.bfloat16, torch.float16)
            and not (torch.is_grad_enabled() or in_dual_level())
            and torch.cuda.is_current_stream_capturing()
        )

    def sums_bias_of(self, layer: Linear, x: Tensor) -> bool:
        """Whether the kernel of its gradient may add up that of the bias of `layer` before it."""
        trained = layer.bias is not None and layer.bias.requires_grad and torch.is_grad_enabled()
        return trained and not in_dual_level() and choice.use_fused(self.fused, x, width=1)

    def after(self, layer: Linear, x: Tensor) -> Tensor:
        """Of `layer(x)`, where `sums_bias_of` says so."""
        return _kernels().linear_gelu(x, layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, same dtype."""
        kernels = _kernels() if choice.use_fused(self.fused, x, width=1) else reference
        return kernels.gelu_tanh(x)


class Sinusoid(nn.Module):
    """cos, then sin, of `timestep * 10000^(-j / half)` for j < half = dim / 2, in float64."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.count = dim // 2

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """`timestep` [B, F] on the 0..1000 scale to [B, F, dim] in `dtype`."""
        j = torch.arange(self.count, dtype=torch.float64, device=timestep.device)
        angle = timestep.double()[..., None] * torch.pow(10000.0, -j / self.count)
        return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


class Patchify(nn.Module):
    """Cut frames into patches of (rows, columns); features of a patch run channel, row, column (the
    order of a flattened convolution weight).
    """

    def __init__(self, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, C, F, H, W] to [B, F, S, C * rows * columns], S = (H / rows) (W / columns),
        row-major.
        """
        rows, columns = self.patch
        cut = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))
        return cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


class Unpatchify(nn.Module):
    """Put patches together; features of a patch run row, column, channel (the reverse of
    `Patchify`, as in the released weights).
    """

    def __init__(self, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`x` [B, F, S, rows * columns * C] with S = h * w of `grid` to [B, C, F, H, W]."""
        rows, columns = self.patch
        cut = x.unflatten(3, (rows, columns, -1)).unflatten(2, grid)
        height, width = grid[0] * rows, grid[1] * columns
        # one reshape, which copies: FSDP2 warns of a network that returns a view
        return cut.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape[0], -1, x.shape[1], height, width)


def _kernels() -> ModuleType:
    """The kernels, imported when first run: Triton is absent on machines without a GPU."""
    from rcm.kernels.fused import api

    return api
