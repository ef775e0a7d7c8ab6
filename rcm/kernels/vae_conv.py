"""Convolutions over windows (rcm/kernels/vae_window.py): the border is already there, so nothing is
padded; frames are channels-last.

Four forms compute the same sums. "direct" is the library's convolution. "pairs" regards two
neighbouring pixels as one of twice the channels: a third more arithmetic, but libraries leave the
tensor cores half idle at 96 channels and less. "tma" is a fused matrix product for Hopper cards.
"columns" is for few output channels: "tma" with the taps along the width as output channels, a
third of the traffic, added up afterwards; its result is float32. Which is fastest was measured, see
docs/performance_log.md.

Shape legend: B batch, T frames, H W, C channels in, N out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.kernels.vae_conv_pack import PackedKernel


def convolve(padded: Tensor, kernel: PackedKernel) -> Tensor:
    """Contiguous [B, T', H', W', N] of a contiguous window [B, T, H, W, C], without bias and
    without padding; float32 from "columns".

    Raises `ValueError` for other channels or dtypes, and for an odd W with form "pairs";
    `RuntimeError` from "tma" without a card for it.
    """
    if padded.shape[-1] != kernel.channels_in or padded.dtype != kernel.data.dtype:
        raise ValueError(
            f"window has {padded.shape[-1]} channels of {padded.dtype}, the kernel reads"
            f" {kernel.channels_in} of {kernel.data.dtype}; pack the weights again after moving"
            " them"
        )
    if kernel.form in ("tma", "columns"):
        # Triton is imported only when asked for
        from rcm.kernels.vae_conv_tma import launch_convolution

        return (
            launch_convolution(padded, kernel) if kernel.form == "tma" else _columns(padded, kernel)
        )
    if kernel.form == "pairs":
        b, t, h, w, c = padded.shape
        if w % 2:
            raise ValueError(f"form 'pairs' needs an even window width, got {w}; use form='direct'")
        out = _library(padded.view(b, t, h, w // 2, 2 * c), kernel)
        return out.view(*out.shape[:3], w - 2, kernel.channels_out)
    return _library(padded, kernel)


def _columns(padded: Tensor, kernel: PackedKernel) -> Tensor:
    """Partial sums per tap along the width, then their sum over shifted columns."""
    from rcm.kernels.vae_conv_tma import launch_convolution

    (kt, ky, kx), n = kernel.taps, kernel.channels_out
    inner = PackedKernel(kernel.data, "tma", (kt, ky, 1), kernel.channels_in, kx * n)
    parts = launch_convolution(padded, inner, out_dtype=torch.float32)
    width = parts.shape[3] - kx + 1
    total = parts[..., :width, :n].contiguous()
    for tap in () if parts.is_meta else range(1, kx):  # meta: as in `vae_conv_pack.fold_nearest`
        total += parts[..., tap : tap + width, tap * n : (tap + 1) * n]
    return total


def _library(padded: Tensor, kernel: PackedKernel) -> Tensor:
    out = F.conv3d(padded.permute(0, 4, 1, 2, 3), kernel.data, stride=kernel.stride)
    return out.permute(0, 2, 3, 4, 1).contiguous()
