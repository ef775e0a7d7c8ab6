"""Where cached keys and values lie: what a cache asks of its store, and the store of plain tensors,
buffers used as a ring. Those of a codec: `kv_coded`; plain with codes beside them: `kv_fp8`.

A place is a list of spans [start, stop) of token slots. Chunks take free slots, wherever they are,
so dropping one costs nothing and the next takes its slots: a ring whose reader does not care for
the order of the keys (softmax does not).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rcm.kernels.masks import MaskSpec

Side = Literal["key", "value"]
Spans = tuple[tuple[int, int], ...]
Pair = tuple[Tensor, Tensor]


class Piece(NamedTuple):
    """Tokens [offset, offset + stop - start) of a chunk in the slots [start, stop); `chunk` is its
    id, None for a forward's own tokens.
    """

    start: int
    stop: int
    chunk: int | None
    offset: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


class Seen(NamedTuple):
    """The keys of a forward, for a store that attends to them itself. `chunks`: (id, tokens) of
    those that come first; `rotated`: at reading, after they were stored; `run`: how many keys there
    are, if all lie in the first slots without a hole, else None.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    rotated: bool = False
    run: int | None = None


class Store(Protocol):
    """Keys and values of all layers, [B, S, N, D] each.

    in_place   chunks lie in the slots of their spans, and what is read comes in the order of slots;
               else they are held by id and read in the order asked for.
    attends    it is an `AttendingStore`, whose `attend` takes the place of the network's attention.
    """

    in_place: bool

    @property
    def attends(self) -> bool:
        """See the class."""

    def put(self, layer: int, chunk: int, spans: Spans, pair: Pair, *, hot: bool = True) -> None:
        """Hold the tokens of `pair` as the chunk; `hot`: it is the newest."""

    def commit(self, chunk: int) -> None:
        """A chunk was put by all layers."""

    def read(self, layer: int, pieces: Sequence[Piece]) -> Pair:
        """Keys and values of `pieces` in order; valid till the next read unless in place."""

    def gather(self, layer: int, past: Sequence[Piece], own: Sequence[Piece], pair: Pair) -> Pair:
        """`read` of `past`, a forward's own tokens with it: they were put as `own`, or, in a store
        that is not in place, are taken from `pair` (no `own`).
        """

    def captures(self, chunks: Sequence[int], *, adding: Sequence[int], one_run: bool) -> bool:
        """Whether a captured pass can read `chunks` and put new ones of `adding` tokens each;
        `one_run`: all that it reads lies in the first slots without a hole.
        """

    def apart(self, layer: int, pair: Pair) -> Pair:
        """`pair` in memory that no `put` touches."""

    def move(self, source: Spans, target: Spans) -> None:
        """Copy slots of every layer; the two do not overlap."""

    def drop(self, chunk: int) -> None:
        """Free a chunk."""

    def clear(self, *, free_buffers: bool) -> None:
        """Forget everything."""

    def num_bytes(self) -> int:
        """Bytes held."""

    def state(self) -> Any:
        """Everything held, as later steps do not change it."""

    def load_state(self, state: Any) -> None:
        """Take up a `state`."""


class AttendingStore(Store, Protocol):
    """A store that attends to what it holds itself."""

    def attend(
        self, layer: int, q: Tensor, pair: Pair, seen: Seen, *, mask: MaskSpec | None
    ) -> Tensor:
        """Attention of rotated queries [B, L, N, D] to keys, rotated, and values."""


def form_of(x: Tensor) -> tuple[torch.dtype, int, torch.Size]:
    """What must agree for `x` [B, S, N, D] to be written into a buffer: all but S."""
    return x.dtype, x.shape[0], x.shape[2:]


def require_form(x: Tensor, held: Tensor) -> None:
    """`ValueError` unless `x` [B, S, N, D] can lie beside what a cache holds."""
    if form_of(x) != form_of(held):
        raise ValueError(
            f"the cache holds {tuple(held.shape)} {held.dtype}, got {tuple(x.shape)} {x.dtype} (of"
            " [B, tokens, N, D]); reset(free_buffers=True) before another batch or dtype"
        )


def runs(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """[start, stop) of parts of these sizes behind each other."""
    return list(pairwise(accumulate(sizes, initial=0)))


def size(spans: Spans) -> int:
    """Slots of `spans`."""
    return sum(stop - start for start, stop in spans)


def pieces_of(spans: Spans, *, chunk: int | None) -> list[Piece]:
    """The parts of a chunk that lies in `spans`, in order of its tokens."""
    offsets = runs(stop - start for start, stop in spans)
    return [Piece(*span, chunk, at) for span, (at, _) in zip(spans, offsets, strict=True)]


def free_spans(used: Sequence[tuple[int, int]], *, below: int) -> Spans:
    """The slots below `below` that no span of `used` holds, lowest first."""
    found, at = [], 0
    for start, stop in sorted(used):
        if start > at and at < below:
            found.append((at, min(start, below)))
        at = max(at, stop)
    if at < below:
        found.append((at, below))
    return tuple(found)


def take(spans: Spans, count: int) -> Spans:
    """The first `count` slots of `spans`."""
    return part_of(spans, 0, count)


def part_of(spans: Spans, first: int, count: int) -> Spans:
    """Slots `first` to `first + count` of `spans`, counted along them."""
    found = []
    for start, stop, _, at in pieces_of(spans, chunk=None):
        low, high = max(first - at, 0), min(first + count - at, stop - start)
        if low < high:
            found.append((start + low, start + high))
    return tuple(found)


class DenseStore:
    """Plain buffers [B, capacity, N, D], two per layer, made by the first write in its dtype.

    Slots that were never written hold zeros: a graph that reads a whole buffer must not meet a NaN.
    """

    in_place = True
    attends = False

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.buffers: list[Pair | None] = [None] * num_layers

    @property
    def ready(self) -> bool:
        """Whether captured passes find all that they read."""
        return True

    def put(self, layer: int, chunk: int, spans: Spans, pair: Pair, *, hot: bool = True) -> None:
        """See `Store`: into `spans`."""
        for buffer, x in zip(self._room(layer, pair), pair, strict=True):
            require_form(x, buffer)
            _fill(buffer, spans, x)

    def read(self, layer: int, pieces: Sequence[Piece]) -> Pair:
        """Keys and values of `pieces` in order: views of one run, copies of several."""
        joined: list[list[int]] = []
        for piece in pieces:
            if joined and joined[-1][1] == piece.start:
                joined[-1][1] = piece.stop
            else:
                joined.append([piece.start, piece.stop])
        cut = [[x[:, start:stop] for start, stop in joined] for x in self.allocated(layer)]
        keys, values = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in cut)
        return keys, values

    def gather(self, layer: int, past: Sequence[Piece], own: Sequence[Piece], pair: Pair) -> Pair:
        """See `Store`: what lies in one run is read as one."""
        return self.read(layer, sorted([*past, *own]))

    def captures(self, chunks: Sequence[int], *, adding: Sequence[int], one_run: bool) -> bool:
        return one_run and self.ready

    def apart(self, layer: int, pair: Pair) -> Pair:
        """See `Store`: a copy of what lies in the buffers."""
        mine = {x.untyped_storage().data_ptr() for x in self.allocated(layer)}
        keys, values = (x.clone() if x.untyped_storage().data_ptr() in mine else x for x in pair)
        return keys, values

    def move(self, source: Spans, target: Spans) -> None:
        for pair in self.buffers:
            for x in pair or ():
                _fill(x, target, torch.cat([x[:, a:b] for a, b in source], dim=1))

    def commit(self, chunk: int) -> None:
        """See `Store`: nothing to do."""

    def drop(self, chunk: int) -> None:
        """See `Store`: its slots are simply free."""

    def clear(self, *, free_buffers: bool) -> None:
        if free_buffers:
            self.buffers = [None] * len(self.buffers)

    def num_bytes(self) -> int:
        return sum(x.nbytes for pair in self.buffers for x in pair or ())

    def state(self) -> Any:
        return [pair and tuple(x.clone() for x in pair) for pair in self.buffers]

    def load_state(self, state: Any) -> None:
        """Take up a `state`, in the buffers at hand if any: captured passes read them."""
        for layer, pair in enumerate(state):
            if pair is None:
                continue
            if self.buffers[layer] is None:
                self.buffers[layer] = (torch.empty_like(pair[0]), torch.empty_like(pair[1]))
            for mine, x in zip(self.allocated(layer), pair, strict=True):
                mine.copy_(x)

    def allocated(self, layer: int) -> Pair:
        """The buffers of a layer; `RuntimeError` before its first write."""
        pair = self.buffers[layer]
        if pair is None:
            raise RuntimeError("the buffers of a cache are allocated by the first write")
        return pair

    def _room(self, layer: int, pair: Pair) -> Pair:
        held = self.buffers[layer]
        if held is None:
            key, value = (x.new_zeros(x.shape[0], self.capacity, *x.shape[2:]) for x in pair)
            held = self.buffers[layer] = key, value
        return held


def _fill(buffer: Tensor, spans: Spans, x: Tensor) -> None:
    """Copy the tokens of `x` [B, L, N, D] into `spans` of `buffer`."""
    for piece in pieces_of(spans, chunk=None):
        part = x[:, piece.offset : piece.offset + piece.tokens]
        buffer[:, piece.start : piece.stop].copy_(part)
