"""Keys and values of finished chunks: what is held, where it stands, what a forward sees.

All bookkeeping is host integers. A forward works on a `CacheView` made for it alone, which is never
changed afterwards, so that recomputation of that forward sees the same context. The cache knows
neither schedules nor eviction policies (`rollout/eviction`) nor context parallelism: behind the
all-to-all it sees all tokens and fewer heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rcm.nets.kv_coded import CodedStore, KVCodec
from rcm.nets.kv_fp8 import Fp8Store
from rcm.nets.kv_store import DenseStore, Spans, Store, free_spans, part_of, size, take
from rcm.nets.kv_view import Attention, CachedChunk, CacheView, Keys, Observer
from rcm.nets.positions import Positions


class KVCache:
    """Cache of `num_layers` layers with room for `capacity_tokens` tokens each.

    keys        "post_rope": keys are stored rotated, positions are final. "pre_rope": stored before
                rotation and rotated at every read by the positions that the cache keeps, which
                `place` may set anew.
    codec       how chunks are stored; None keeps plain tensors in one buffer per layer.
                `hot_chunks` newest chunks stay plain.
    attention   "fp8": passes attend to this cache in FP8, over codes that lie beside the plain
                tensors.
    Committed state: `chunks`, oldest first. Dropped chunks leave slots that the next ones take, so
    memory is bounded by the capacity and positions are not bounded at all.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        capacity_tokens: int,
        keys: Keys = "post_rope",
        codec: KVCodec | None = None,
        hot_chunks: int = 0,
        attention: Attention = "net",
    ) -> None:
        if num_layers < 1 or capacity_tokens < 1:
            raise ValueError(
                f"a cache needs at least one layer and one token, got {num_layers} layers and"
                f" capacity_tokens={capacity_tokens}"
            )
        if keys not in ("post_rope", "pre_rope"):
            raise ValueError(f"keys must be 'post_rope' or 'pre_rope', got {keys!r}")
        if hot_chunks < 0 or (hot_chunks and codec is None):
            raise ValueError(
                f"hot_chunks must be 0 or more, and 0 without a codec, got {hot_chunks} and"
                f" codec={codec!r}"
            )
        if attention not in ("net", "fp8") or (attention == "fp8" and codec is not None):
            raise ValueError(
                f"attention must be 'net' or, without a codec, 'fp8', got {attention!r} with"
                f" codec={codec!r}"
            )
        self.num_layers, self.capacity_tokens, self.keys = num_layers, capacity_tokens, keys
        self.chunks: tuple[CachedChunk, ...] = ()
        self.epoch, self._next_id = 0, 0
        self.store: Store
        if codec is not None:
            self.store = CodedStore(num_layers, capacity_tokens, codec, hot_chunks=hot_chunks)
        elif attention == "fp8":
            self.store = Fp8Store(num_layers, capacity_tokens, turned=keys == "post_rope")
        else:
            self.store = DenseStore(num_layers, capacity_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    @property
    def branches(self) -> tuple[KVCache, ...]:
        """Itself: a guided stream has two (`PairedCache`)."""
        return (self,)

    def chunk(self, chunk_id: int) -> CachedChunk:
        """The chunk called `chunk_id`; `IndexError` if it is not held."""
        for chunk in self.chunks:
            if chunk.id == chunk_id:
                return chunk
        raise IndexError(
            f"chunk {chunk_id} is not in the cache, which holds"
            f" {[chunk.id for chunk in self.chunks]}"
        )

    def append(
        self,
        visible: Sequence[int] | None = None,
        *,
        observers: Sequence[Observer | None] = (),
        as_id: int | None = None,
    ) -> CacheView:
        """View of a forward that sees chunks `visible` (None: all) and adds its own tokens.

        Refuses dual tensors; stores detached; `RuntimeError` beyond the capacity. An observer
        `(layer, q, k)` is shown the rotated queries and all rotated keys of every layer. `as_id`
        enters a dropped chunk again under its id, as the newest.
        """
        if as_id is not None and (
            not 0 <= as_id < self._next_id or any(chunk.id == as_id for chunk in self.chunks)
        ):
            raise ValueError(f"chunk {as_id} was not dropped from this cache")
        return CacheView(
            self,
            "append",
            self._visible(visible),
            observer=observers[0] if observers else None,
            as_id=as_id,
        )

    def readonly(
        self,
        num_chunks: int | None = None,
        *,
        visible: Sequence[int] | None = None,
        transient: bool = False,
    ) -> CacheView:
        """View of a forward that sees the first `num_chunks`, `visible` or all, and adds none.

        `transient=True` (inference only): the forward's tokens are written in place into free slots
        and read from there, without a copy of the prefix; bookkeeping does not change and the next
        such forward overwrites them.
        """
        if num_chunks is not None and visible is not None:
            raise ValueError("give num_chunks or visible, not both")
        if num_chunks is not None and num_chunks < 0:
            raise ValueError(f"num_chunks must not be negative, got {num_chunks}")
        if num_chunks is not None and num_chunks > self.num_chunks:
            raise IndexError(
                f"asked for {num_chunks} chunks of a cache that holds {self.num_chunks}"
            )
        chunks = self.chunks[:num_chunks] if num_chunks is not None else self._visible(visible)
        return CacheView(self, "transient" if transient else "readonly", chunks)

    def evict(self, ids: Sequence[int]) -> None:
        """Drop these chunks; their slots are free at once. `IndexError` for an id not held."""
        gone = {self.chunk(i).id for i in ids}
        if not gone:
            return
        self.chunks = tuple(chunk for chunk in self.chunks if chunk.id not in gone)
        for chunk_id in gone:
            self.store.drop(chunk_id)
        self.epoch += 1

    def place(self, positions: Mapping[int, Positions | Sequence[int]]) -> None:
        """Give chunks other temporal positions, by id: one per frame, or a `Positions`.
        `ValueError` in a post-RoPE cache, whose keys are turned already, and for another number of
        frames or tokens.
        """
        if self.keys == "post_rope":
            raise ValueError(
                "keys of a post_rope cache stand at their final positions; make the cache with"
                " keys='pre_rope'"
            )
        new = {}
        for chunk_id, given in positions.items():
            chunk = self.chunk(chunk_id)
            if not isinstance(given, Positions):
                given = chunk.positions.moved_to(tuple(given))
            if given.num_tokens != chunk.num_tokens:
                raise ValueError(
                    f"positions of {given.num_tokens} tokens for chunk {chunk_id}, which holds"
                    f" {chunk.num_tokens}"
                )
            new[chunk_id] = replace(chunk, positions=given)
        self.chunks = tuple(new.get(chunk.id, chunk) for chunk in self.chunks)

    def reset(self, free_buffers: bool = True) -> None:
        """Forget everything; `free_buffers=False` keeps memory for inputs of the same form."""
        self.chunks, self._next_id = (), 0
        self.epoch += 1
        self.store.clear(free_buffers=free_buffers)

    def num_bytes(self) -> int:
        """Bytes that keys and values take on the device now."""
        return self.store.num_bytes()

    def state(self) -> dict[str, Any]:
        """Everything the cache holds, as a copy that later steps do not change."""
        return {"chunks": self.chunks, "next_id": self._next_id, "store": self.store.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a `state` of a cache made alike."""
        self.chunks, self._next_id = state["chunks"], state["next_id"]
        self.epoch += 1
        self.store.load_state(state["store"])

    def room(self, tokens: int) -> Spans:
        """Slots for `tokens` more. Chunks beyond the first `num_tokens + tokens` slots are moved
        down, so that a whole cache and the new tokens always lie in one run. `RuntimeError` where
        there is no room.
        """
        total = self.num_tokens + tokens
        if total > self.capacity_tokens:
            raise RuntimeError(
                f"{tokens} tokens after {self.num_tokens} exceed"
                f" capacity_tokens={self.capacity_tokens} of the cache; make it larger, or let a"
                " policy drop chunks"
            )
        if self.store.in_place and any(stop > total for _, stop in self._used()):
            self._move_down(below=total)
        return take(free_spans(self._used(), below=total), tokens)

    def _used(self) -> list[tuple[int, int]]:
        return [span for chunk in self.chunks for span in chunk.spans]

    def _move_down(self, *, below: int) -> None:
        for chunk in self.chunks:
            high = tuple((max(start, below), stop) for start, stop in chunk.spans if stop > below)
            if not high:
                continue
            target = take(free_spans(self._used(), below=below), size(high))
            self.store.move(high, target)
            moved = replace(chunk, spans=_substituted(chunk.spans, below, target))
            self.chunks = tuple(moved if other is chunk else other for other in self.chunks)
        self.epoch += 1

    def _visible(self, ids: Sequence[int] | None) -> tuple[CachedChunk, ...]:
        if ids is None:
            return self.chunks
        wanted = {self.chunk(i).id for i in ids}
        return tuple(chunk for chunk in self.chunks if chunk.id in wanted)


def _substituted(spans: Spans, below: int, target: Spans) -> Spans:
    """`spans` with the slots from `below` on replaced by those of `target`, in token order."""
    found, used = [], 0
    for start, stop in spans:
        if start < below:
            found.append((start, min(stop, below)))
        high = stop - max(start, below)
        if high > 0:
            found += part_of(target, used, high)
            used += high
    return tuple(found)
