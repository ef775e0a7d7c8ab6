"""The fused form of `rcm.kernels.vae_window.window`: one program owns a tile of pixels through all
frames of a call.

Because a program owns its pixels in every frame, it can read the carried frames, write the window
and replace the carried frames without a second launch and without a race.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcm.kernels.launching import device_of
from rcm.kernels.precompile import launch
from rcm.kernels.vae_window_eager import NORM_FLOOR, Features, Norm, Window

_LAYOUTS = {"plain": 0, "frame_pairs": 1, "pixel_quads": 2}
_NORMS = {"none": 0, "rms": 1, "rms_silu": 2}
TILE_ELEMENTS = 2048
WARPS = 4


@triton.jit
def _source(
    row, col, channel, batch, plain, plane, frames, height, width,
    CHANNELS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Where pixels lie in what holds a frame, its size, and where the batch entry begins."""
    if LAYOUT == 2:
        cells_wide = width // 2 + 1
        source_plane = (height // 2 + 1).to(tl.int64) * cells_wide * (4 * CHANNELS)
        cell = ((row + 1) // 2 * cells_wide + (col + 1) // 2).to(tl.int64)
        group = (row % 2) * 2 + col % 2
        source = (cell * (4 * CHANNELS) + group * CHANNELS)[:, None] + channel[None, :]
        source_batch = batch * frames * source_plane
    elif LAYOUT == 1:
        source_plane = plane * 2
        source = (row * width + col).to(tl.int64)[:, None] * (2 * CHANNELS) + channel[None, :]
        source_batch = batch * (frames // 2) * source_plane
    else:
        source_plane = plane
        source = plain
        source_batch = batch * frames * plane
    return source, source_plane, source_batch


@triton.jit(do_not_specialize=["frames", "height", "width", "adds", "keeps"])
def window_kernel(
    value, bias, residual, gamma, carried, padded, kept, frames, height, width, adds, keeps,
    FLOOR: tl.constexpr, ROOT: tl.constexpr, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr,
    NORM: tl.constexpr, CARRIED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the padded plane, batch). Everything is contiguous; offsets of frames are 64
    bit. Whether a residual is added and the sum is kept are numbers, not variants: each of those is
    compiled before the first frame.
    """
    padded_width = width + LOW + HIGH
    padded_pixels = (height + LOW + HIGH) * padded_width
    batch = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = pixel // padded_width - LOW
    col = pixel % padded_width - LOW
    exists = pixel < padded_pixels
    inside = exists & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    channel = tl.arange(0, BLOCK_C)
    real = channel < CHANNELS
    get = inside[:, None] & real[None, :]
    put = exists[:, None] & real[None, :]

    plane = height.to(tl.int64) * width * CHANNELS
    plain = (row * width + col).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    source, source_plane, source_batch = _source(
        row, col, channel, batch, plain, plane, frames, height, width, CHANNELS, LAYOUT
    )
    value += source_batch
    residual += batch * frames * plane
    kept += batch * frames * plane
    carried += batch * CARRIED * plane
    out_plane = padded_pixels.to(tl.int64) * CHANNELS
    target = (
        padded
        + batch * (frames + CARRIED) * out_plane
        + pixel.to(tl.int64)[:, None] * CHANNELS
        + channel[None, :]
    )

    if NORM > 0:
        scale = tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32) * ROOT
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
        if LAYOUT == 1:
            shift_odd = tl.load(bias + CHANNELS + channel, mask=real, other=0.0).to(tl.float32)

    newer = tl.zeros((BLOCK_P, BLOCK_C), dtype=padded.dtype.element_ty)
    older = newer
    if CARRIED == 2:
        older = tl.load(carried + plain, mask=get, other=0.0)
        newer = tl.load(carried + plane + plain, mask=get, other=0.0)
        tl.store(target, older, mask=put)
        tl.store(target + out_plane, newer, mask=put)
    if CARRIED == 1:
        newer = tl.load(carried + plain, mask=get, other=0.0)
        tl.store(target, newer, mask=put)
    target += CARRIED * out_plane

    for t in range(frames):
        if LAYOUT == 1:
            place = value + (t // 2) * source_plane + (t % 2) * CHANNELS + source
        else:
            place = value + t * source_plane + source
        x = tl.load(place, mask=get, other=0.0).to(tl.float32)
        if HAS_BIAS:
            if LAYOUT == 1:
                x += tl.where(t % 2 == 0, shift, shift_odd)[None, :]
            else:
                x += shift[None, :]
        if adds != 0:
            x += tl.load(residual + t * plane + plain, mask=get, other=0.0).to(tl.float32)
        x = tl.where(get, x, 0.0)
        y = x.to(padded.dtype.element_ty)
        if keeps != 0:
            tl.store(kept + t * plane + plain, y, mask=get)
        if NORM > 0:
            # the norm sees the rounded sum, as a later reader of `kept` does
            x = y.to(tl.float32)
            length = tl.sqrt(tl.sum(x * x, 1))
            x = x * (1.0 / tl.maximum(length, FLOOR))[:, None] * scale[None, :]
            if NORM == 2:
                x = x / (1.0 + tl.exp(-x))
            y = x.to(padded.dtype.element_ty)
        tl.store(target + t * out_plane, y, mask=put)
        older = newer
        newer = y

    if CARRIED == 2:
        tl.store(carried + plain, older, mask=get)
        tl.store(carried + plane + plain, newer, mask=get)
    if CARRIED == 1:
        tl.store(carried + plain, newer, mask=get)


def launch_window(
    features: Features,
    *,
    gamma: Tensor | None,
    norm: Norm,
    carried: Tensor | None,
    border: tuple[int, int],
    keep: bool,
    tile_elements: int = TILE_ELEMENTS,
    warps: int = WARPS,
) -> Window:
    """One launch of `window_kernel` over already checked arguments; bfloat16, float16 or float32.

    Raises `TypeError` for float64, which the kernel would round to float32.
    """
    value = features.value
    if value.dtype == torch.float64:
        raise TypeError("the fused window computes in float32; run the float64 codec on the CPU")
    b, t, h, w, c = features.shape
    count = 0 if carried is None else carried.shape[1]
    low, high = border
    padded = value.new_empty(b, count + t, h + low + high, w + low + high, c)
    nothing_to_add = (
        features.bias is None and features.residual is None and features.layout == "plain"
    )
    kept = (value if nothing_to_add else value.new_empty(b, t, h, w, c)) if keep else None
    block_c = triton.next_power_of_2(c)
    block_p = max(1, tile_elements // block_c)
    tensors = (value, features.bias, features.residual, gamma, carried, padded, kept)
    if not all(x is None or x.is_contiguous() for x in tensors):
        raise ValueError("the fused window reads contiguous channels-last tensors only")
    # absent tensors are never read; any pointer will do
    arguments = [value if x is None else x for x in tensors]
    with device_of(value):
        launch(
            window_kernel, (triton.cdiv((h + low + high) * (w + low + high), block_p), b),
            *arguments, t, h, w, int(features.residual is not None),
            int(keep and not nothing_to_add),
            FLOOR=NORM_FLOOR, ROOT=c**0.5, CHANNELS=c, LAYOUT=_LAYOUTS[features.layout],
            NORM=_NORMS[norm], CARRIED=count, LOW=low, HIGH=high,
            HAS_BIAS=features.bias is not None, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
    return Window(padded, kept)
