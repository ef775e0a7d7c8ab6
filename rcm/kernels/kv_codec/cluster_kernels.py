"""Triton kernels of k-means on the unit sphere with one map for all heads: features, an iteration
in two launches. No atomics: sums are taken tile by tile in a fixed order, so results repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def features(x, points, strides, sizes, TOKENS: tl.constexpr, D: tl.constexpr):
    """points[b, s] = the mean over heads of x[b, s], of length 1. `strides` of x over batch, token,
    head; `sizes` = (tokens, heads).
    """
    tokens, heads = sizes
    stride_b, stride_s, stride_n = strides
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, D)[None, :]
    there = (token < tokens)[:, None]
    row = x + batch * stride_b + token[:, None].to(tl.int64) * stride_s + channel
    total = tl.zeros((TOKENS, D), tl.float32)
    for head in range(heads):
        total += tl.load(row + head * stride_n, mask=there, other=0.0).to(tl.float32)
    mean = total / heads
    length = tl.sqrt(tl.sum(mean * mean, axis=1))
    unit = mean / tl.maximum(length, 1e-12)[:, None]
    tl.store(points + (batch * tokens + token[:, None]) * D + channel, unit, mask=there)


@triton.jit
def assign(
    points, centres, assigned, partial, tokens, clusters, tiles,
    TOKENS: tl.constexpr, CLUSTERS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The nearest centre [B, k, D] of every point [B, S, D], the first of equals, and for a tile of
    tokens the sum [B, tiles, k, D] of the points of every cluster; those past the end are zero.
    """
    batch, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, D)
    there = token < tokens
    point = tl.load(
        points + (batch * tokens + token[:, None]) * D + channel[None, :],
        mask=there[:, None],
        other=0.0,
    )
    best, index = tl.full((TOKENS,), float("inf"), tl.float32), tl.zeros((TOKENS,), tl.int32)
    for first in range(0, clusters, CLUSTERS):
        which = first + tl.arange(0, CLUSTERS)
        known = which < clusters
        centre = tl.load(
            centres + (batch * clusters + which[:, None]) * D + channel[None, :],
            mask=known[:, None],
            other=0.0,
        )
        square = tl.where(known, tl.sum(centre * centre, axis=1), float("inf"))
        distance = square[None, :] - 2 * tl.dot(point, tl.trans(centre), input_precision="tf32x3")
        least, at = tl.min(distance, axis=1, return_indices=True)
        closer = least < best
        index = tl.where(closer, first + at, index)
        best = tl.minimum(least, best)
    tl.store(assigned + batch * tokens + token, index, mask=there)
    for first in range(0, clusters, CLUSTERS):
        which = first + tl.arange(0, CLUSTERS)
        known = which < clusters
        belongs = (which[:, None] == index[None, :]).to(tl.float32)
        row = (batch * tiles + tile) * clusters + which
        total = tl.dot(belongs, point, input_precision="tf32x3")
        tl.store(partial + row[:, None] * D + channel[None, :], total, mask=known[:, None])


@triton.jit
def recentre(partial, centres, clusters, tiles, CLUSTERS: tl.constexpr, D: tl.constexpr):
    """Centres as the sums of their points, tile after tile, at length 1, which are the means at
    length 1; zero without any.
    """
    batch = tl.program_id(1).to(tl.int64)
    which = tl.program_id(0) * CLUSTERS + tl.arange(0, CLUSTERS)
    channel = tl.arange(0, D)[None, :]
    known = which < clusters
    total = tl.zeros((CLUSTERS, D), tl.float32)
    for tile in range(tiles):
        row = (batch * tiles + tile) * clusters + which
        total += tl.load(partial + row[:, None] * D + channel, mask=known[:, None], other=0.0)
    unit = total / tl.maximum(tl.sqrt(tl.sum(total * total, axis=1)), 1e-12)[:, None]
    tl.store(centres + (batch * clusters + which[:, None]) * D + channel, unit, mask=known[:, None])
