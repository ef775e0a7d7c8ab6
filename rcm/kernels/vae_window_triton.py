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

TILE_ELEMENTS = 2048
WARPS = 4


@triton.jit(
    do_not_specialize=[
        "frames", "height", "width", "carries", "low", "high", "quads", "silu", "adds", "keeps",
    ]
)  # fmt: skip
def window_kernel(
    value, bias, residual, gamma, carried, padded, kept, frames, height, width, carries, low, high,
    quads, silu, adds, keeps,
    FLOOR: tl.constexpr, ROOT: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the padded plane, batch). Everything is contiguous; offsets of frames are 64
    bit. `carries` (0 to 2 frames), the border (`low`, `high`), whether pixels lie in quads, are
    activated, a residual is added and the sum kept are numbers, not variants: each of those is
    compiled before the first frame.
    """
    padded_width = width + low + high
    padded_pixels = (height + low + high) * padded_width
    batch = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = pixel // padded_width - low
    col = pixel % padded_width - low
    exists = pixel < padded_pixels
    inside = exists & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    channel = tl.arange(0, BLOCK_C)
    real = channel < CHANNELS
    get = inside[:, None] & real[None, :]
    put = exists[:, None] & real[None, :]

    plane = height.to(tl.int64) * width * CHANNELS
    at = row * width + col
    plain = at.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    if PAIRS:
        source = at.to(tl.int64)[:, None] * (2 * CHANNELS) + channel[None, :]
        source_plane = plane * 2
        value += batch * (frames // 2) * source_plane
    else:
        cells_wide = width // 2 + 1
        cell = (row + 1) // 2 * cells_wide + (col + 1) // 2
        at = tl.where(quads != 0, cell * 4 + (row % 2) * 2 + col % 2, at)
        source = at.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        quads_plane = (height // 2 + 1).to(tl.int64) * cells_wide * (4 * CHANNELS)
        source_plane = tl.where(quads != 0, quads_plane, plane)
        value += batch * frames * source_plane
    residual += batch * frames * plane
    kept += batch * frames * plane
    carried += batch * carries * plane
    out_plane = padded_pixels.to(tl.int64) * CHANNELS
    target = (
        padded
        + batch * (frames + carries) * out_plane
        + pixel.to(tl.int64)[:, None] * CHANNELS
        + channel[None, :]
    )

    if NORM:
        scale = tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32) * ROOT
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
        if PAIRS:
            shift_odd = tl.load(bias + CHANNELS + channel, mask=real, other=0.0).to(tl.float32)

    newer = tl.zeros((BLOCK_P, BLOCK_C), dtype=padded.dtype.element_ty)
    older = newer
    if carries > 0:
        newer = tl.load(carried + (carries - 1) * plane + plain, mask=get, other=0.0)
        if carries == 2:
            older = tl.load(carried + plain, mask=get, other=0.0)
            tl.store(target, older, mask=put)
            target += out_plane
        tl.store(target, newer, mask=put)
        target += out_plane

    for t in range(frames):
        if PAIRS:
            place = value + (t // 2) * source_plane + (t % 2) * CHANNELS + source
        else:
            place = value + t * source_plane + source
        x = tl.load(place, mask=get, other=0.0).to(tl.float32)
        if HAS_BIAS:
            if PAIRS:
                x += tl.where(t % 2 == 0, shift, shift_odd)[None, :]
            else:
                x += shift[None, :]
        if adds != 0:
            x += tl.load(residual + t * plane + plain, mask=get, other=0.0).to(tl.float32)
        x = tl.where(get, x, 0.0)
        y = x.to(padded.dtype.element_ty)
        if keeps != 0:
            tl.store(kept + t * plane + plain, y, mask=get)
        if NORM:
            # the norm sees the rounded sum, as a later reader of `kept` does
            x = y.to(tl.float32)
            length = tl.sqrt(tl.sum(x * x, 1))
            x = x * (1.0 / tl.maximum(length, FLOOR))[:, None] * scale[None, :]
            if silu != 0:
                x = x / (1.0 + tl.exp(-x))
            y = x.to(padded.dtype.element_ty)
        tl.store(target + t * out_plane, y, mask=put)
        older = newer
        newer = y

    if carries == 2:
        tl.store(carried + plain, older, mask=get)
    if carries > 0:
        tl.store(carried + (carries - 1) * plane + plain, newer, mask=get)


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
            *arguments, t, h, w, count, low, high, int(features.layout == "pixel_quads"),
            int(norm == "rms_silu"), int(features.residual is not None),
            int(keep and not nothing_to_add),
            FLOOR=NORM_FLOOR, ROOT=c**0.5, CHANNELS=c, PAIRS=features.layout == "frame_pairs",
            NORM=norm != "none", HAS_BIAS=features.bias is not None, BLOCK_P=block_p,
            BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
    return Window(padded, kept)
