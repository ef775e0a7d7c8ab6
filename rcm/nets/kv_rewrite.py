"""Cached chunks cut, gathered, merged or turned in time, for policies that reshape the past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_store import Pair, free_spans, part_of, runs, take
from rcm.nets.kv_view import CachedChunk
from rcm.nets.positions import Positions, cut

Make = Callable[[int, Tensor, Tensor], Pair]


def split(cache: KVCache, *, before: Sequence[int]) -> None:
    """Cut chunks at the tokens `before`, counted over all in order; what stays whole keeps its id.

    Costs nothing in a plain cache; in a coded one a cut chunk is restored and coded again in parts.
    """
    found: list[CachedChunk] = []
    for chunk, (start, stop) in _counted(cache):
        inner = sorted({at - start for at in before if start < at < stop})
        found += _cut_chunk(cache, chunk, [0, *inner, stop - start]) if inner else [chunk]
    if len(found) > len(cache.chunks):
        cache.chunks, cache.epoch = tuple(found), cache.epoch + 1


def rewrite(
    cache: KVCache, ids: Sequence[int], parts: Sequence[Positions], make: Make
) -> tuple[int, ...]:
    """Replace neighbouring chunks `ids` by one new chunk per entry of `parts`; the new ids.

    `make(layer, keys, values)` is given the tokens of `ids` in order, [B, S, N, D], rotated or not
    as the cache keeps keys, and returns those of all `parts` in order. `ValueError` for chunks that
    are not neighbours or another number of tokens, `RuntimeError` beyond the capacity.
    """
    old = [cache.chunk(i) for i in ids]
    at = cache.chunks.index(old[0])
    if list(cache.chunks[at : at + len(old)]) != old:
        raise ValueError(
            f"chunks {list(ids)} are not neighbours in a cache of"
            f" {[chunk.id for chunk in cache.chunks]}"
        )
    kept = [chunk for chunk in cache.chunks if chunk not in old]
    total = sum(part.num_tokens for part in parts)
    if sum(chunk.num_tokens for chunk in kept) + total > cache.capacity_tokens:
        raise RuntimeError(
            f"{total} tokens in the place of chunks {list(ids)} exceed"
            f" capacity_tokens={cache.capacity_tokens}"
        )
    new = _at_free_slots(cache, kept, parts)
    for layer in range(cache.num_layers):
        pair = make(layer, *cache.store.read(layer, [p for chunk in old for p in chunk.pieces]))
        if any(x.shape[1] != total for x in pair):
            raise ValueError(
                f"a rewrite to {total} tokens was given {pair[0].shape[1]} keys and"
                f" {pair[1].shape[1]} values"
            )
        _put(cache, layer, new, pair)
    for chunk in old:
        cache.store.drop(chunk.id)
    cache.chunks = (*cache.chunks[:at], *new, *cache.chunks[at + len(old) :])
    cache.epoch += 1
    return tuple(chunk.id for chunk in new)


def region(cache: KVCache, start: int, stop: int) -> tuple[int, ...]:
    """Ids of the chunks that lie within tokens [start, stop), counted over all chunks in order."""
    counted = _counted(cache)
    return tuple(chunk.id for chunk, (low, high) in counted if start <= low and high <= stop)


def _counted(cache: KVCache) -> list[tuple[CachedChunk, tuple[int, int]]]:
    """Chunks and their tokens [start, stop), counted over all chunks in order."""
    places = runs(chunk.num_tokens for chunk in cache.chunks)
    return list(zip(cache.chunks, places, strict=True))


def _cut_chunk(cache: KVCache, chunk: CachedChunk, bounds: list[int]) -> list[CachedChunk]:
    parts = []
    for start, stop in pairwise(bounds):
        spans = part_of(chunk.spans, start, stop - start)
        parts.append(CachedChunk(_new_id(cache), spans, cut(chunk.positions, start, stop - start)))
    if not cache.store.in_place:
        for layer in range(cache.num_layers):
            _put(cache, layer, parts, cache.store.read(layer, chunk.pieces))
        cache.store.drop(chunk.id)
    return parts


def _at_free_slots(
    cache: KVCache, kept: Sequence[CachedChunk], parts: Sequence[Positions]
) -> list[CachedChunk]:
    used, new = [span for chunk in kept for span in chunk.spans], []
    for part in parts:
        spans = take(free_spans(used, below=cache.capacity_tokens), part.num_tokens)
        used += spans
        new.append(CachedChunk(_new_id(cache), spans, part))
    return new


def _new_id(cache: KVCache) -> int:
    cache._next_id += 1
    return cache._next_id - 1


def _put(cache: KVCache, layer: int, chunks: Sequence[CachedChunk], pair: Pair) -> None:
    """Put the tokens of `pair`, which may lie in the store's own memory, as `chunks`, in order."""
    keys, values = cache.store.apart(layer, pair)
    for chunk, (a, b) in zip(chunks, runs(c.num_tokens for c in chunks), strict=True):
        cache.store.put(layer, chunk.id, chunk.spans, (keys[:, a:b], values[:, a:b]), hot=False)


def lift(cache: KVCache, hidden: Sequence[int], *, room: int) -> None:
    """Move the chunks `hidden` of a plain cache above the others and above `room` slots for the
    tokens of the next chunk, so that what it sees and its own tokens lie in one run from the first
    slot on, which is read without a copy. Nothing changes but where tokens lie.
    """
    if not cache.store.in_place:
        return
    away = [chunk for chunk in cache.chunks if chunk.id in set(hidden)]
    if not away:
        return
    ceiling = min(cache.num_tokens + room, cache.capacity_tokens)
    edge = ceiling - sum(chunk.num_tokens for chunk in away)
    stay = [chunk for chunk in cache.chunks if chunk not in away]
    rising = [c for c in away if any(low < edge or high > ceiling for low, high in c.spans)]
    sinking = [c for c in stay if any(high > edge for _, high in c.spans)]
    if not rising and not sinking:
        return
    moving, moved = [*rising, *sinking], {}
    used = [span for chunk in cache.chunks if chunk not in moving for span in chunk.spans]
    for chunk in moving:
        low = [(0, edge)] if chunk in rising else []
        spans = take(free_spans([*used, *low], below=ceiling), chunk.num_tokens)
        used += spans
        moved[chunk.id] = replace(chunk, spans=spans)
    source = tuple(span for chunk in moving for span in chunk.spans)
    cache.store.move(source, tuple(span for chunk in moving for span in moved[chunk.id].spans))
    cache.chunks = tuple(moved.get(chunk.id, chunk) for chunk in cache.chunks)
    cache.epoch += 1
