"""Rows in e4m3 with one float32 scale each: the rule, its plain formula, its kernel, and the
product of two such matrices.

The rule for a row x: amax = max(max |x|, 1e-30) in float32, q = e4m3(x * (448 / amax)) to the
nearest, ties to even, scale = amax / 448, so that x is about q * scale. A NaN or an infinity in a
row makes all its products NaN: saturation hides nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.kernels import precompile
from rcm.kernels.fused.reference import accumulate_dtype, gelu_tanh
from rcm.kernels.launching import device_of, power_of_2, unit_stride

Rows = tuple[Tensor, Tensor]
"""e4m3 [M, K] and scales [M, 1] float32."""
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest e4m3 number."""
SMALLEST_AMAX = 1e-30
"""Keeps the scale of a row of zeros, and its inverse, finite."""
ALIGNMENT = 16
"""Hopper's FP8 products take inner and outer widths that are multiples of this."""
MAX_WIDTH = 16384
"""A row is held in registers; the widest feed-forward of a Wan network has 13824 channels."""


def quantise_rows(x: Tensor, *, gelu: bool = False) -> Rows:
    """`x` [M, K] floating, or with `gelu` GELU(x) in its tanh form, as e4m3 [M, K] and scales [M,
    1] float32.

    One kernel on CUDA, outside of compiled code; the plain formula elsewhere. Neither waits for the
    device.
    """
    if (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and x.dtype != torch.float64
        and x.shape[1] <= MAX_WIDTH
    ):
        return launch(x, gelu=gelu)
    return reference(gelu_tanh(x) if gelu else x)


def reference(x: Tensor) -> Rows:
    """The plain formula of `quantise_rows` without GELU."""
    wide = x.float()
    amax = wide.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_AMAX)
    # both divisions between tensors: by a number, torch multiplies with a rounded inverse
    largest = torch.full_like(amax, LARGEST)
    return (wide * (largest / amax)).clamp(-LARGEST, LARGEST).to(E4M3), amax / largest


def launch(x: Tensor, *, gelu: bool) -> Rows:
    """The kernel of `quantise_rows`; rows of any stride. Imports Triton, which machines without a
    GPU may lack.
    """
    from rcm.kernels.fused import quantise_kernels

    x = unit_stride(x)
    rows, width = x.shape
    q = torch.empty(rows, width, dtype=E4M3, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = power_of_2(width)
    if rows:
        with device_of(x):
            precompile.launch(
                quantise_kernels.quantise_rows, (rows,), x, q, scale, x.stride(0),
                GELU=gelu, WIDTH=width, BLOCK=block, num_warps=min(16, max(4, block // 1024)),
            )  # fmt: skip
    return q, scale


def product(x: Rows, weight: Rows, bias: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """x weight^T + bias [M, N] in `dtype`, of `x` [M, K] and `weight` [N, K], both with their
    scales.

    On CUDA one product of the library with rowwise scales, which writes bfloat16 only, its sums in
    the tensor cores' own precision, below float32. Elsewhere the same sum in float32
    (float64 for a `dtype` of float64), scaled, biased and rounded in this order.
    """
    (q, scale), (weight_q, weight_scale) = x, weight
    if q.is_cuda:
        scales = {"scale_a": scale, "scale_b": weight_scale.t()}
        return torch._scaled_mm(
            q, weight_q.t(), **scales, bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    wide = accumulate_dtype(dtype)
    y = (q.to(wide) @ weight_q.to(wide).t()) * scale.to(wide) * weight_scale.to(wide).t()
    return (y if bias is None else y + bias.to(wide)).to(dtype)
