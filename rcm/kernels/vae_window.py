"""Convolution inputs of a causal video autoencoder: sum, normalise, activate, pad and carry frames
over, in one pass.

A causal 3x3x3 convolution reads a *window*: the last frames of its input in earlier calls, then the
new frames, with a border of zeros in space. `window` makes it from what the previous convolution
left, so that no addition, norm, activation, concatenation or padding is a pass of its own. Frames
are stored channels-last. Shape legend: B batch, T frames, H W height and width, C channels, K
carried frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.kernels.precompile import device_for
from rcm.kernels.vae_window_eager import Features, Norm, Window, eager_window


def window(
    features: Features,
    *,
    gamma: Tensor | None = None,
    norm: Norm = "none",
    carried: Tensor | None = None,
    border: tuple[int, int] = (0, 0),
    keep: bool = False,
) -> Window:
    """The window of the next convolution: carried frames, then norm(features), inside a border of
    zeros.

    norm "rms": y = x / max(|x|_2, 1e-12) * sqrt(C) * gamma over the channels, gamma [C];
    "rms_silu": y * sigmoid(y) of that. Arithmetic in float32 (float64 for float64), one rounding at
    the end. `carried` [B, K, H, W, C], K of 1 or 2, is read and then overwritten in place with the
    last K frames of the window. `border` = rows (and columns) of zeros before and after. `keep`
    also returns the sum, which a residual connection needs. On CUDA one Triton launch, elsewhere
    eager; no gradient. Raises `ValueError` for shapes that do not fit.
    docs/reference/encoders.md#vae-layers.
    """
    _check(features, gamma=gamma, norm=norm, carried=carried, border=border)
    if device_for(features.value).type == "cuda":
        # Triton is imported only where there is a card for it
        from rcm.kernels.vae_window_triton import launch_window

        return launch_window(
            features, gamma=gamma, norm=norm, carried=carried, border=border, keep=keep
        )
    return eager_window(features, gamma=gamma, norm=norm, carried=carried, border=border, keep=keep)


def _check(
    features: Features,
    *,
    gamma: Tensor | None,
    norm: Norm,
    carried: Tensor | None,
    border: tuple[int, int],
) -> None:
    b, _, h, w, c = features.shape
    if norm not in ("none", "rms", "rms_silu"):
        raise ValueError(f"norm must be 'none', 'rms' or 'rms_silu', got {norm!r}")
    if (gamma is None) != (norm == "none") or (gamma is not None and gamma.shape != (c,)):
        raise ValueError(
            f"norm={norm!r} over {c} channels got a gamma of shape"
            f" {None if gamma is None else tuple(gamma.shape)}"
        )
    if features.residual is not None and features.residual.shape != torch.Size(features.shape):
        raise ValueError(f"residual is {tuple(features.residual.shape)}, expected {features.shape}")
    if carried is not None and (
        carried.shape[1] not in (1, 2)
        or carried.shape != torch.Size((b, carried.shape[1], h, w, c))
    ):
        raise ValueError(
            f"carried frames are {tuple(carried.shape)}, expected [{b}, 1 or 2, {h}, {w}, {c}]; a"
            " stream serves one frame size and batch"
        )
    if carried is not None and carried.dtype != features.value.dtype:
        raise ValueError(
            f"carried frames are {carried.dtype}, features {features.value.dtype}; open a new"
            " stream after moving the codec"
        )
    if min(border) < 0 or max(border) > 1:
        raise ValueError(f"border is (0 or 1, 0 or 1), got {border}")
