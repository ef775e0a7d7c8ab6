"""What a forward sees of a cache and writes to it: as a whole, and layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from rcm.core.dual import in_dual_level
from rcm.kernels.masks import MaskSpec
from rcm.nets.kv_store import (
    AttendingStore,
    Pair,
    Piece,
    Seen,
    Spans,
    Store,
    part_of,
    pieces_of,
    require_form,
    runs,
    size,
)
from rcm.nets.layout import TokenLayout
from rcm.nets.positions import Positions, at_frames, concatenated, cut

if TYPE_CHECKING:
    from rcm.nets.kv_cache import KVCache
    from rcm.nets.layers import RMSNorm
    from rcm.nets.rope import RopeTable

Keys = Literal["post_rope", "pre_rope"]
Mode = Literal["append", "readonly", "transient"]
Attention = Literal["net", "fp8"]
"""Who attends to what a cache shows: the network's own back end, or the cache in FP8."""
Observer = Callable[[int, Tensor, Tensor], None]
_REFUSES_DUALS = (
    "append under a dual level: a cache holds constants; fill it outside the tangent pass and read"
    " it there"
)


@dataclass(frozen=True)
class CachedChunk:
    """A chunk in a cache: `id` (counted since the last reset), slots, positions of its tokens."""

    id: int
    spans: Spans
    positions: Positions

    @property
    def num_tokens(self) -> int:
        return size(self.spans)

    @property
    def pieces(self) -> list[Piece]:
        """Where its tokens lie, in their order."""
        return pieces_of(self.spans, chunk=self.id)


class CacheView:
    """What one forward sees and writes. Made by `KVCache.append` / `readonly`; the network calls
    `begin` before its first layer and `commit` after its last.

    `prefix_tokens` visible cached tokens. `tables`, `times`: rotary tables, and what the network
    makes of its time, to use instead of those of layout and timestep (static ones of a captured
    pass).
    """

    tables: Any = None
    times: Any = None

    def __init__(
        self,
        cache: KVCache,
        mode: Mode,
        chunks: tuple[CachedChunk, ...],
        *,
        observer: Observer | None = None,
        as_id: int | None = None,
    ) -> None:
        self._as_id = as_id
        self._cache, self._epoch, self._next_id = cache, cache.epoch, cache._next_id
        self.mode, self.visible, self.observer = mode, chunks, observer
        self.keys = cache.keys
        self.prefix_tokens = sum(chunk.num_tokens for chunk in chunks)
        self._new: tuple[CachedChunk, ...] = ()
        self._order: list[Piece] | None = None

    @property
    def num_layers(self) -> int:
        return self._cache.num_layers

    def begin(self, layout: TokenLayout) -> None:
        """Check this forward and find its slots, before its first layer.

        `ValueError` unless the visible tokens are as many as `layout` expects before its frames;
        `RuntimeError` if a write finds no room, if the cache has changed since the view was made,
        or if an append happens under a dual level.
        """
        if self.prefix_tokens != layout.context_tokens:
            raise ValueError(
                f"the layout expects {layout.context_tokens} cached tokens"
                f" ({layout.tokens_per_frame} per frame), the cache view shows"
                f" {self.prefix_tokens}; append earlier chunks first, choose num_chunks in"
                " readonly(), or build the layout from the view"
            )
        self._require_current()
        if self.mode == "append" and self._next_id != self._cache._next_id:
            raise RuntimeError(
                "an append view serves one forward; take a fresh one from cache.append()"
            )
        if self.mode == "append" and in_dual_level():
            raise RuntimeError(_REFUSES_DUALS)
        if self.mode == "readonly":
            return
        spans = self._cache.room(layout.num_tokens)
        # room() may have moved chunks
        self._epoch = self._cache.epoch
        self.visible = tuple(self._cache.chunk(chunk.id) for chunk in self.visible)
        chunks, per_frame = [], layout.tokens_per_frame
        for i, (first, last) in enumerate(runs(layout.chunks or (layout.num_frames,))):
            place = at_frames(layout.frame_index[first:last], layout.grid)
            own = part_of(spans, first * per_frame, (last - first) * per_frame)
            new_id = self._next_id + i if self._as_id is None else self._as_id
            chunks.append(CachedChunk(new_id, own, place))
        self._new = tuple(chunks)
        wanted = self._pieces()
        self._order = sorted(wanted) if self.store.in_place else wanted
        if not layout.mask.is_full and self._order != wanted:
            raise RuntimeError(
                "a mask that distinguishes keys needs the cached chunks in order before the new"
                " ones; reset() the cache"
            )

    @property
    def branches(self) -> tuple[CacheView, ...]:
        """Itself: a guided forward has two (`PairedView`)."""
        return (self,)

    @property
    def own_spans(self) -> Spans:
        """Slots of the forward's own tokens, once `begin` found them; empty for a readonly view."""
        return tuple(span for chunk in self._new for span in chunk.spans)

    @property
    def is_one_run(self) -> bool:
        """Whether what is read, own tokens included, lies in the first slots without a hole."""
        at = 0
        for piece in self._order or ():
            if piece.start != at:
                return False
            at = piece.stop
        return self._order is not None

    def in_order(self, x: Tensor) -> Tensor:
        """`x` [B, prefix + L, N, D] of `assemble` as chunks in order, then the own tokens."""
        wanted = self._pieces()
        if self._order is None or self._order == wanted:
            return x
        places = runs(piece.tokens for piece in self._order)
        found = dict(zip(self._order, places, strict=True))
        return torch.cat([x[:, slice(*found[piece])] for piece in wanted], dim=1)

    def _pieces(self) -> list[Piece]:
        """What the forward reads: chunks in order, and its own tokens behind them."""
        own = [piece for chunk in self._new for piece in pieces_of(chunk.spans, chunk=None)]
        return [piece for chunk in self.visible for piece in chunk.pieces] + own

    def positions(self, layout: TokenLayout) -> Positions:
        """Positions of all keys, in the order of `assemble`, for rotation at reading."""
        own = at_frames(layout.frame_index, layout.grid)
        if self._order is None or not self.store.in_place:
            return concatenated([*(chunk.positions for chunk in self.visible), own])
        known = {chunk.id: chunk.positions for chunk in self.visible}
        new = {chunk.spans: chunk.positions for chunk in self._new}
        found = []
        for piece in self._order:
            if piece.chunk is not None:
                whole = known[piece.chunk]
            else:
                whole = next(p for s, p in new.items() if _holds(s, piece))
            found.append(cut(whole, piece.offset, piece.tokens))
        return concatenated(found)

    @property
    def store(self) -> Store:
        """Where the cache's keys and values lie."""
        return self._cache.store

    @property
    def can_be_captured(self) -> bool:
        """Whether captured passes can do this: one plain run, or codes at addresses."""
        adding = [chunk.num_tokens for chunk in self._new] if self.mode == "append" else []
        chunks = [chunk.id for chunk in self.visible]
        return self.store.captures(chunks, adding=adding, one_run=self.is_one_run)

    @property
    def own_chunk(self) -> CachedChunk | None:
        """The one chunk that an append adds, once `begin` placed it; None if not one."""
        return self._new[0] if self.mode == "append" and len(self._new) == 1 else None

    def layer(self, index: int) -> LayerView:
        return LayerView(self, index)

    def commit(self, layout: TokenLayout) -> None:
        """After all layers of an append: count the new tokens, a chunk per entry of
        `layout.chunks`. Nothing in the other modes.
        """
        if self.mode != "append":
            return
        cache = self._cache
        cache.chunks += self._new
        cache._next_id += len(self._new) if self._as_id is None else 0
        for chunk in self._new:
            cache.store.commit(chunk.id)

    def _require_current(self) -> None:
        if self._epoch != self._cache.epoch:
            raise RuntimeError(
                "the cache was reset or dropped chunks after this view was made; take a fresh view"
            )


class LayerView:
    """One layer of a `CacheView`."""

    def __init__(self, view: CacheView, index: int) -> None:
        self._view, self._index = view, index

    @property
    def keys(self) -> Keys:
        """Whether keys pass through `assemble` before or after rotation."""
        return self._view.keys

    @property
    def appends(self) -> bool:
        """Whether this forward commits tokens: it must run once, without recomputation."""
        return self._view.mode == "append"

    @property
    def prefix_tokens(self) -> int:
        """Cached tokens that precede the forward's own in the results of `assemble` where tangents
        or masks tell them apart.
        """
        return self._view.prefix_tokens

    def observe(self, q: Tensor, k: Tensor) -> None:
        """Show the rotated queries [B, L, N, D] and all rotated keys [B, prefix + L, N, D], cached
        chunks in order, to whoever asked.
        """
        if self._view.observer is not None:
            self._view.observer(self._index, q, self._view.in_order(k))

    def assemble(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, prefix + L, N, D] for the attention of this forward from its own `k`,
        `v` [B, L, N, D].

        Cached tokens are constants: no gradient, no tangent. Append stores detached tensors;
        gradients still reach this forward's own.
        """
        view, store, layer = self._view, self._view.store, self._index
        view._require_current()
        past = [piece for chunk in view.visible for piece in chunk.pieces]
        own: list[Piece] = []
        if view.mode == "append":
            if in_dual_level():
                raise RuntimeError(_REFUSES_DUALS)
            own = self._put((k.detach(), v.detach()))
        elif view.mode == "transient" and (in_dual_level() or k.requires_grad or v.requires_grad):
            raise RuntimeError(
                "a transient write keeps neither tangents nor gradients; use"
                " readonly(transient=False)"
            )
        if view.mode != "readonly" and not (k.requires_grad or v.requires_grad):
            if view.mode == "transient" and store.in_place:
                own = self._put((k, v))
            return store.gather(layer, past, own, (k, v))
        if not past:
            return k, v
        k_past, v_past = store.read(layer, past)
        require_form(k, k_past)
        return torch.cat([k_past, k], dim=1), torch.cat([v_past, v], dim=1)

    @property
    def attends(self) -> bool:
        """Whether `attend` takes the place of the network's attention."""
        return self._view.store.attends

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None) -> Tensor:
        """Attention of rotated queries [B, L, N, D] to the rotated keys of `assemble`."""
        view = self._view
        chunks = view.visible + (view._new if view.mode == "append" else ())
        seen = Seen(
            tuple((chunk.id, chunk.num_tokens) for chunk in chunks),
            rotated=self.keys == "pre_rope",
            run=k.shape[1] if view.is_one_run else None,
        )
        store = cast(AttendingStore, view.store)
        return store.attend(self._index, q, (k, v), seen, mask=mask)

    def _put(self, pair: Pair) -> list[Piece]:
        """Hold the forward's own tokens; where they lie."""
        view, (k, v) = self._view, pair
        if not view._new:
            raise RuntimeError("begin() must run before the layers of a forward that writes")
        places = runs(chunk.num_tokens for chunk in view._new)
        for chunk, (a, b) in zip(view._new, places, strict=True):
            view.store.put(self._index, chunk.id, chunk.spans, (k[:, a:b], v[:, a:b]))
        return [piece for chunk in view._new for piece in chunk.pieces]


class EnteredLayer(LayerView, ABC):
    """A layer of captured passes. `takes_projections`: whether `enter` can be called here;
    `enters_turned`: whether the keys that it returns are rotated.
    """

    takes_projections: bool
    enters_turned: bool

    @abstractmethod
    def enter(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        norms: tuple[RMSNorm, RMSNorm],
        table: RopeTable,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries [B, L, N, D] of the projections q, k, v [B, L, E], and all keys and values
        with this pass's own among them.
        """


def _holds(spans: Spans, piece: Piece) -> bool:
    return any(start <= piece.start and piece.stop <= stop for start, stop in spans)
