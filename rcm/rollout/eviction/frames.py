"""How many frames a cache holds and where chunks stand, for policies that count frames."""

from __future__ import annotations

from collections.abc import Sequence

from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_rewrite import region
from rcm.nets.kv_view import CachedChunk


def frame_tokens(cache: KVCache) -> int:
    """Tokens of a frame; the cache holds something."""
    rows, columns = cache.chunks[0].positions.grid
    return rows * columns


def num_frames(chunk: CachedChunk) -> int:
    """Frames of a chunk."""
    rows, columns = chunk.positions.grid
    return chunk.num_tokens // (rows * columns)


def cached_frames(cache: KVCache) -> int:
    """Frames that a cache holds."""
    return sum(map(num_frames, cache.chunks))


def within_frames(cache: KVCache, count: int) -> tuple[int, ...]:
    """Ids of the chunks that lie within the first `count` cached frames."""
    return region(cache, 0, count * frame_tokens(cache)) if cache.chunks else ()


def place_in_a_row(
    branches: Sequence[KVCache],
    chunks: Sequence[CachedChunk],
    *,
    first: int,
    lowest: int | None = None,
) -> int:
    """Give the frames of `chunks` the positions first, first + 1, ... (at least `lowest`) in every
    branch; returns the next position.
    """
    placed = {}
    for chunk in chunks:
        count = num_frames(chunk)
        row = range(first, first + count)
        placed[chunk.id] = tuple(row if lowest is None else (max(lowest, t) for t in row))
        first += count
    for cache in branches:
        cache.place(placed)
    return first
