"""The weights of a convolution in the order that one of its forms (`rcm.kernels.vae_conv`) reads
them, and the choice of the form.

Shape legend: C channels in, N out, kt ky kx taps along time, height, width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.kernels.precompile import device_for

Form = Literal["direct", "pairs", "tma", "columns"]
TMA_CAPABILITY = (9, 0)
FEW_CHANNELS_OUT = 16
PAIR_CHANNELS = range(64, 128)


@dataclass(frozen=True)
class PackedKernel:
    """Weights in the order one form reads them.

    `data`: "direct" and "pairs" [N', C', kt, ky, kx'] channels-last, the others [N', rows of K].
    """

    data: Tensor
    form: Form
    taps: tuple[int, int, int]
    channels_in: int
    channels_out: int
    stride: tuple[int, int, int] = (1, 1, 1)


def best_form(weight: Tensor, *, stride: tuple[int, int, int] = (1, 1, 1)) -> Form:
    """The form measured fastest for weights [N, C, kt, ky, kx] on their device and dtype."""
    device = device_for(weight)
    if device.type != "cuda" or weight.element_size() != 2 or stride != (1, 1, 1):
        return "direct"
    n, c = weight.shape[:2]
    if torch.cuda.get_device_capability(device) == TMA_CAPABILITY and tma_obstacle(weight) is None:
        return "columns" if n < FEW_CHANNELS_OUT and weight.shape[4] > 1 else "tma"
    return "pairs" if c in PAIR_CHANNELS and weight.shape[4] == 3 else "direct"


def tma_obstacle(weight: Tensor, *, stride: tuple[int, int, int] = (1, 1, 1)) -> str | None:
    """Why the forms "tma" and "columns" cannot take these weights; None if they can."""
    if stride != (1, 1, 1):
        return f"stride {stride}"
    if weight.shape[1] * weight.element_size() % 16:
        return (
            f"{weight.shape[1]} input channels of {weight.dtype}, of which the bulk copy needs a"
            " multiple of 16 bytes"
        )
    return None


def pack(weight: Tensor, *, form: Form, stride: tuple[int, int, int] = (1, 1, 1)) -> PackedKernel:
    """Weights [N, C, kt, ky, kx] for `form`. Raises `ValueError` if that form does not compute such
    a convolution.
    """
    n, c, kt, ky, kx = weight.shape

    def packed(data: Tensor) -> PackedKernel:
        return PackedKernel(data, form, (kt, ky, kx), c, n, stride)

    if form == "direct":
        return packed(weight.contiguous(memory_format=torch.channels_last_3d))
    if form == "pairs":
        if kx != 3 or stride != (1, 1, 1):
            raise ValueError(
                f"form 'pairs' needs 3 taps along the width and stride 1, got {kx} and {stride};"
                " use form='direct'"
            )
        return packed(_paired(weight).contiguous(memory_format=torch.channels_last_3d))
    if form not in ("tma", "columns"):
        raise ValueError(f"form must be 'direct', 'pairs', 'tma' or 'columns', got {form!r}")
    obstacle = tma_obstacle(weight, stride=stride)
    if obstacle:
        raise ValueError(
            f"form {form!r} cannot compute this convolution: {obstacle}; use form='direct'"
        )
    if form == "columns":
        taps_out = weight.permute(4, 0, 1, 2, 3).reshape(kx * n, c, kt, ky, 1)
        return packed(_rows(taps_out, multiple=row_multiple(c)))
    return packed(_rows(weight, multiple=row_multiple(kx * c)))


def fold_nearest(weight: Tensor) -> Tensor:
    """Weights [4 N, C, 1, 2, 2] that do to an image what nearest-neighbour doubling and then
    `weight` [N, C, 3, 3] (border 1) do.

    Over a window with a border of 1 cell they leave the layout "pixel_quads" of
    rcm/kernels/vae_window.py. Of the three taps along an axis two always meet the same small pixel,
    so they are added; arithmetic falls to 4/9. Sums in float32 or wider, one rounding.
    """
    n, c = weight.shape[:2]
    # shapes are enough, and torch's Python code for meta tensors takes seconds to import
    if weight.is_meta:
        return weight.new_empty(4 * n, c, 1, 2, 2)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    folded = wide.new_zeros(2, 2, n, c, 2, 2)
    for y_parity in (0, 1):
        for x_parity in (0, 1):
            for dy in range(3):
                for dx in range(3):
                    cell = (_cell(y_parity, dy), _cell(x_parity, dx))
                    folded[y_parity, x_parity, :, :, cell[0], cell[1]] += wide[:, :, dy, dx]
    return folded.reshape(4 * n, c, 1, 2, 2).to(weight.dtype)


def row_multiple(row: int) -> int:
    """How many channels of K one step of the "tma" form reads: 64 where that fills up a row of taps
    with no more zeros than 32 does.
    """
    return 64 if -(-row // 32) % 2 == 0 else 32


def _cell(parity: int, tap: int) -> int:
    """Which of the two small pixels under a cell the tap meets."""
    return (parity + tap - 1) // 2 - parity + 1


def _paired(weight: Tensor) -> Tensor:
    n, c, kt, ky, _ = weight.shape
    paired = weight.new_zeros(2, n, 2, c, kt, ky, 2)
    for parity in (0, 1):
        for tap in range(3):
            at = parity + tap
            paired[parity, :, at % 2, :, :, :, at // 2] = weight[..., tap]
    return paired.reshape(2 * n, 2 * c, kt, ky, 2)


def _rows(weight: Tensor, *, multiple: int) -> Tensor:
    """[N, kt * ky * K'] with K' = kx * C (tap, channel), filled with zeros to a multiple."""
    n, c, kt, ky, kx = weight.shape
    rows = weight.permute(0, 2, 3, 4, 1).reshape(n, kt * ky, kx * c)
    return F.pad(rows, (0, -(kx * c) % multiple)).reshape(n, -1).contiguous()
