"""Convolution of a window as one matrix product on Hopper: bulk copies bring both factors, no patch
is ever written to memory.

In a channels-last window the kx * C numbers that one row of taps multiplies are neighbours in
memory, and so are those of the next pixel, C numbers further. The left factor is therefore a plain
matrix with overlapping rows, [pixels, kx * C] with row stride C, and a shift by (frame, row) taps
is a shift of its rows. Rows that straddle the border are computed and not stored (under 1 % at 480
x 832).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rcm.kernels.launching import device_of
from rcm.kernels.precompile import launch
from rcm.kernels.vae_conv_pack import PackedKernel, row_multiple

FEW_PROGRAMS = 132


@dataclass(frozen=True)
class ConvTiles:
    """One program computes `block_m` pixels times `block_n` + `rest_n` channels; `rest_n` may be
    0.
    """

    block_m: int
    block_n: int
    rest_n: int
    num_warps: int
    num_stages: int


def conv_tiles(*, pixels: int, channels_out: int) -> ConvTiles:
    """The tiles measured best on an H200 (docs/performance_log.md). 96 and 192 channels are split
    unevenly, as Triton's tiles are powers of two and a padded one would waste a quarter of the
    arithmetic.
    """
    if channels_out <= 64:
        return ConvTiles(256, max(16, triton.next_power_of_2(channels_out)), 0, 8, 4)
    if channels_out <= 96:
        return ConvTiles(256, 64, 32, 8, 5)
    if channels_out == 192:
        return ConvTiles(256, 128, 64, 8, 3)
    if (
        triton.cdiv(pixels, 256) * triton.cdiv(channels_out, 128) < FEW_PROGRAMS
        and channels_out % 192 == 0
    ):
        return ConvTiles(128, 128, 64, 4, 4)
    return ConvTiles(256, 128, 0, 8, 4)


@triton.jit(
    do_not_specialize=[
        "frames", "frame_pixels", "row_pixels", "height", "width", "batch_pixels", "tap_rows",
        "taps_y", "steps", "tiles_n",
    ]
)  # fmt: skip
def convolution_kernel(
    window, weight, weight_rest, out, frames, frame_pixels, row_pixels, height, width, batch_pixels,
    tap_rows, taps_y, steps, tiles_n,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (pixel tiles of all frames x channel tiles, batch). `frames`, `height` and `width` are
    those of the output, the other sizes those of the window. Only tiles and `N` are constants, so
    that layers share kernels: each is compiled before the first frame.
    """
    first = tl.program_id(0) // tiles_n * BLOCK_M
    channel = tl.program_id(0) % tiles_n * (BLOCK_N + REST_N)
    start = tl.program_id(1) * batch_pixels + first
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if REST_N > 0:
        rest = tl.zeros((BLOCK_M, REST_N), dtype=tl.float32)
    # counted up rather than divided out of `step`, as divisors are not known to the compiler
    k, y = 0, 0
    for step in tl.range(0, tap_rows * steps, num_stages=STAGES):
        x = window.load([start, k])
        w = weight.load([channel, step * BLOCK_K])
        acc = tl.dot(x, w.T, acc)
        if REST_N > 0:
            w_rest = weight_rest.load([channel + BLOCK_N, step * BLOCK_K])
            rest = tl.dot(x, w_rest.T, rest)
        k += BLOCK_K
        next_row = k == steps * BLOCK_K
        k = tl.where(next_row, 0, k)
        y = tl.where(next_row, y + 1, y)
        start = tl.where(next_row, start + row_pixels, start)
        next_frame = y == taps_y
        y = tl.where(next_frame, 0, y)
        start = tl.where(next_frame, start + frame_pixels - taps_y * row_pixels, start)
    pixel = first + tl.arange(0, BLOCK_M)
    frame = pixel // frame_pixels
    row = pixel % frame_pixels // row_pixels
    col = pixel % frame_pixels % row_pixels
    inside = (frame < frames) & (row < height) & (col < width)
    place = ((tl.program_id(1) * frames + frame).to(tl.int64) * height + row) * width + col
    # first, as its accumulators leave registers to the addresses of the others
    if REST_N > 0:
        n = channel + BLOCK_N + tl.arange(0, REST_N)
        tl.store(
            out + place[:, None] * N + n[None, :],
            rest.to(out.dtype.element_ty),
            mask=inside[:, None] & (n < N)[None, :],
        )
    n = channel + tl.arange(0, BLOCK_N)
    tl.store(
        out + place[:, None] * N + n[None, :],
        acc.to(out.dtype.element_ty),
        mask=inside[:, None] & (n < N)[None, :],
    )


def launch_convolution(
    padded: Tensor,
    kernel: PackedKernel,
    *,
    tiles: ConvTiles | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """[B, T', H', W', N] of a contiguous window [B, T, H, W, C] in `out_dtype` (None: the
    window's); one launch.

    Sums in float32. `tiles` overrides the table, for benchmarks. Raises `ValueError` for a window
    smaller than the taps.
    """
    b, t, h, w, c = padded.shape
    kt, ky, kx = kernel.taps
    n = kernel.channels_out
    size = (t - kt + 1, h - ky + 1, w - kx + 1)
    if min(size) < 1 or not padded.is_contiguous():
        raise ValueError(
            f"a window of {tuple(padded.shape)} is too small for taps {kernel.taps}, or not"
            " contiguous"
        )
    tiles = tiles or conv_tiles(pixels=size[0] * h * w, channels_out=n)
    block_k = row_multiple(kx * c)
    steps = triton.cdiv(kx * c, block_k)
    rows = TensorDescriptor(
        padded, [b * t * h * w - kx + 1, kx * c], [c, 1], [tiles.block_m, block_k]
    )
    weight = TensorDescriptor.from_tensor(kernel.data, [tiles.block_n, block_k])
    rest = TensorDescriptor.from_tensor(kernel.data, [tiles.rest_n or tiles.block_n, block_k])
    out = padded.new_empty(b, *size, n, dtype=out_dtype or padded.dtype)
    columns = triton.cdiv(n, tiles.block_n + tiles.rest_n)
    with device_of(padded):
        launch(
            convolution_kernel, (triton.cdiv(size[0] * h * w, tiles.block_m) * columns, b), rows,
            weight, rest, out, size[0], h * w, w, size[1], size[2], t * h * w, kt * ky, ky,
            steps, columns, N=n, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            REST_N=tiles.rest_n, BLOCK_K=block_k, STAGES=tiles.num_stages,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out
