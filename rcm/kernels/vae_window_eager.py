"""What a window of a causal convolution is made from and what comes out, and the
operator-by-operator form of making it.

Shape legend: B batch, T frames, H W height and width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["plain", "frame_pairs", "pixel_quads"]
Norm = Literal["none", "rms", "rms_silu"]
NORM_FLOOR = 1e-12


@dataclass(frozen=True)
class Features:
    """Frames [B, T, H, W, C] that are a sum not yet carried out: `value` + `bias` + `residual`.

    `value` is contiguous, in one of three layouts: "plain" [B, T, H, W, C]; "frame_pairs" [B, T/2,
    H, W, 2C], two consecutive frames side by side in the channels; "pixel_quads" [B, T, H/2+1,
    W/2+1, 4C], where pixel (y, x) is channel group 2 (y mod 2) + x mod 2 of cell ((y+1) div 2,
    (x+1) div 2), the form in which a 2x2 convolution leaves an image of twice the size. `bias` has
    C entries, 2C for "frame_pairs". `residual` is plain. docs/reference/encoders.md#vae-layers.
    """

    value: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    layout: Layout = "plain"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, T, H, W, C) of the sum."""
        b, t, h, w, c = self.value.shape
        if self.layout == "frame_pairs":
            return b, 2 * t, h, w, c // 2
        if self.layout == "pixel_quads":
            return b, t, 2 * (h - 1), 2 * (w - 1), c // 4
        return b, t, h, w, c

    def total(self) -> Tensor:
        """The sum itself, plain [B, T, H, W, C] in the dtype of `value`; added in float32 or
        wider.
        """
        if self.bias is None and self.residual is None and self.layout == "plain":
            return self.value
        return _sum(self).to(self.value.dtype)


@dataclass(frozen=True)
class Window:
    """`padded` [B, K + T, H + low + high, W + low + high, C]: what the convolution reads. `kept`
    the sum [B, T, H, W, C], if asked for.
    """

    padded: Tensor
    kept: Tensor | None


def eager_window(
    features: Features,
    *,
    gamma: Tensor | None,
    norm: Norm,
    carried: Tensor | None,
    border: tuple[int, int],
    keep: bool,
) -> Window:
    """What `window` computes, operator by operator, on any device; the kernel is tested against
    it.
    """
    dtype = features.value.dtype
    kept = features.total()
    new = kept
    if gamma is not None:  # there is a norm
        wide = kept.to(torch.promote_types(dtype, torch.float32))
        wide = (
            wide
            / wide.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
            * (gamma.to(wide.dtype) * gamma.numel() ** 0.5)
        )
        new = (torch.nn.functional.silu(wide) if norm == "rms_silu" else wide).to(dtype)
    frames = new if carried is None else torch.cat([carried, new], dim=1)
    if carried is not None:
        carried.copy_(frames[:, -carried.shape[1] :])
    low, high = border
    padded = (
        torch.nn.functional.pad(frames, (0, 0, low, high, low, high)) if low or high else frames
    )
    return Window(padded.contiguous(), kept if keep else None)


def _sum(features: Features) -> Tensor:
    value = features.value.to(torch.promote_types(features.value.dtype, torch.float32))
    b, t, h, w, c = features.shape
    if value.is_meta:  # a plan of kernels to compile: as in `vae_conv_pack.fold_nearest`
        return value.new_empty(b, t, h, w, c)
    if features.layout == "frame_pairs":
        value = value if features.bias is None else value + features.bias
        value = value.unflatten(-1, (2, c)).movedim(4, 2).reshape(b, t, h, w, c)
    elif features.layout == "pixel_quads":
        value = _pixels(value, height=h, width=w)
    if features.bias is not None and features.layout != "frame_pairs":
        value = value + features.bias
    return value if features.residual is None else value + features.residual


def _pixels(quads: Tensor, *, height: int, width: int) -> Tensor:
    """Images [B, T, H, W, C] out of the layout "pixel_quads"."""
    cells = quads.unflatten(-1, (2, 2, -1))
    image = quads.new_empty(*quads.shape[:2], height, width, cells.shape[-1])
    for y in (0, 1):
        for x in (0, 1):
            image[:, :, y::2, x::2] = cells[:, :, y : y + height // 2, x : x + width // 2, y, x]
    return image
