"""Runs the autoencoder's Triton kernels in the interpreter and prints their errors as JSON; a
process of its own: it is chosen at import.

TRITON_INTERPRET=1 python -m tests.support.interpreted_vae
"""

from __future__ import annotations

import itertools
import json
import sys

import torch
import torch.nn.functional as F

from rcm.kernels.vae_conv import _columns, convolve
from rcm.kernels.vae_conv_pack import fold_nearest, pack
from rcm.kernels.vae_conv_tma import ConvTiles, launch_convolution
from rcm.kernels.vae_window_eager import Features, eager_window
from rcm.kernels.vae_window_triton import launch_window

CONVOLUTIONS = {
    # B, T, H, W, C, N, taps
    "3x3x3": (1, 4, 6, 8, 16, 20, (3, 3, 3)),
    "3x3x3, batch of 2, uneven split of channels": (2, 4, 5, 9, 48, 48, (3, 3, 3)),
    "folded 2x2": (2, 2, 5, 9, 32, 40, (1, 2, 2)),
    "over time": (2, 4, 5, 6, 16, 32, (3, 1, 1)),
    "8 channels in, filled rows": (1, 3, 6, 9, 8, 20, (3, 3, 3)),
    "several tiles per frame": (1, 4, 34, 9, 8, 16, (3, 3, 3)),
}


def convolution_errors() -> dict[str, float]:
    """Largest error over largest value, of every fused form, against float64."""
    errors = {}
    for name, (b, t, h, w, c, n, taps) in CONVOLUTIONS.items():
        x, weight = torch.randn(b, t, h, w, c), torch.randn(n, c, *taps)
        truth = F.conv3d(x.permute(0, 4, 1, 2, 3).double(), weight.double()).permute(0, 2, 3, 4, 1)
        tiles = ConvTiles(32, 32, 16, 4, 2) if "uneven" in name else ConvTiles(64, 16, 0, 4, 2)
        results = {
            "tma": launch_convolution(x, pack(weight, form="tma"), tiles=tiles),
            "columns": _columns(x, pack(weight, form="columns")),
        }
        for form, result in results.items():
            errors[f"{name}, {form}"] = ((result - truth).abs().max() / truth.abs().max()).item()
    return errors


def window_errors() -> dict[str, float]:
    """Largest difference from the eager window, per layout, over carried frames, frame counts,
    norms and borders.
    """
    errors = {}
    b, h, w, c = 2, 4, 6, 12
    borders = ((0, 0), (1, 1), (0, 1))
    for layout, carried, frames in itertools.product(("plain", "frame_pairs", "pixel_quads"), (0, 1, 2), (1, 2, 4)):
        if layout == "frame_pairs" and frames == 1:
            continue
        sizes = {
            "plain": (b, frames, h, w, c),
            "frame_pairs": (b, frames // 2, h, w, 2 * c),
            "pixel_quads": (b, frames, h // 2 + 1, w // 2 + 1, 4 * c),
        }
        worst = 0.0
        for index, (norm, added) in enumerate((("rms_silu", True), (("none", "rms")[frames % 2], carried == 1))):
            bias = torch.randn(2 * c if layout == "frame_pairs" else c) if added else None
            features = Features(torch.randn(sizes[layout]), bias, torch.randn(b, frames, h, w, c) if added else None, layout)
            gamma = None if norm == "none" else torch.randn(c)
            memory = torch.randn(b, carried, h, w, c) if carried else None
            other = None if memory is None else memory.clone()
            asked = {"gamma": gamma, "norm": norm, "border": borders[(index + frames + carried) % 3], "keep": True}
            want = eager_window(features, carried=memory, **asked)
            got = launch_window(features, carried=other, tile_elements=512, **asked)
            pairs = [(want.padded, got.padded), (want.kept, got.kept)] + ([] if memory is None else [(memory, other)])
            worst = max([worst] + [(x - y).abs().max().item() for x, y in pairs])
        errors[f"{layout}, {carried} carried, {frames} frames"] = worst
    return errors


def fold_error() -> float:
    """Folded nearest-neighbour convolution, fused, against interpolation and convolution in
    float64.
    """
    x, weight = torch.randn(2, 3, 4, 5, 8), torch.randn(6, 8, 3, 3)
    large = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2).double(), scale_factor=2, mode="nearest")
    truth = F.conv2d(large, weight.double(), padding=1).permute(0, 2, 3, 1).unflatten(0, (2, 3))
    padded = launch_window(Features(x), gamma=None, norm="none", carried=None, border=(1, 1), keep=False).padded
    quads = convolve(padded, pack(fold_nearest(weight), form="tma"))
    error = (
        launch_window(Features(quads, layout="pixel_quads"), gamma=None, norm="none", carried=None, border=(0, 0), keep=False).padded
        - truth
    )
    return (error.abs().max() / truth.abs().max()).item()


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.stdout.write(json.dumps({"convolutions": convolution_errors(), "windows": window_errors(), "fold": fold_error()}))
