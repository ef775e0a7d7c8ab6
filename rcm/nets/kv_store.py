"""Where cached keys and values lie: plain buffers used as a ring, or the blobs of a codec.

A place is a list of spans [start, stop) of token slots. Chunks take free slots, wherever they are, so dropping one costs nothing and the
next takes its slots: a ring whose reader does not care for the order of the keys (softmax does not).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Side = Literal["key", "value"]
Spans = tuple[tuple[int, int], ...]
Pair = tuple[Tensor, Tensor]


class KVCodec(Protocol):
    """Storage format of a quantised cache: one blob per layer, chunk and side."""

    def encode(self, x: Tensor, *, side: Side, layer: int) -> Any:
        """Blob of `x` [B, S, N, D]."""

    def decode(self, blob: Any, *, side: Side) -> Tensor:
        """[B, S, N, D] of a blob, in the dtype that was encoded."""

    def decode_into(self, blob: Any, out: Tensor, *, side: Side) -> None:
        """`decode`, written into `out` [B, S, N, D] (any strides)."""


class Piece(NamedTuple):
    """Tokens [offset, offset + stop - start) of a chunk in the slots [start, stop); `chunk` is its id, None for a forward's own tokens."""

    start: int
    stop: int
    chunk: int | None
    offset: int


def size(spans: Spans) -> int:
    """Slots of `spans`."""
    return sum(stop - start for start, stop in spans)


def pieces_of(spans: Spans, *, chunk: int | None) -> list[Piece]:
    """The parts of a chunk that lies in `spans`, in order of its tokens."""
    found, offset = [], 0
    for start, stop in spans:
        found.append(Piece(start, stop, chunk, offset))
        offset += stop - start
    return found


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
    taken = []
    for start, stop in spans:
        if count <= 0:
            break
        taken.append((start, min(stop, start + count)))
        count -= taken[-1][1] - taken[-1][0]
    return tuple(taken)


def part_of(spans: Spans, first: int, count: int) -> Spans:
    """Slots `first` to `first + count` of `spans`, counted along them."""
    found, at = [], 0
    for start, stop in spans:
        low, high = max(first - at, 0), min(first + count - at, stop - start)
        if low < high:
            found.append((start + low, start + high))
        at += stop - start
    return tuple(found)


class DenseStore:
    """Plain keys and values, per layer two buffers [B, capacity, N, D], allocated by the first write in its dtype.

    Slots that were never written hold zeros: a graph that reads a whole buffer must not meet a NaN.
    """

    in_place = True

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.buffers: list[Pair | None] = [None] * num_layers

    def write(self, layer: int, spans: Spans, pair: Pair) -> None:
        """Put the tokens of `pair` (keys, values [B, L, N, D]) into `spans`."""
        for buffer, x in zip(self._allocated(layer, pair), pair, strict=True):
            if (x.dtype, x.shape[0], x.shape[2:]) != (buffer.dtype, buffer.shape[0], buffer.shape[2:]):
                raise ValueError(
                    f"cache buffers are {tuple(buffer.shape)} {buffer.dtype}, got {tuple(x.shape)} {x.dtype}; "
                    "reset(free_buffers=True) before another batch"
                )
            for piece in pieces_of(spans, chunk=None):
                buffer[:, piece.start : piece.stop].copy_(x[:, piece.offset : piece.offset + piece.stop - piece.start])

    def read(self, layer: int, pieces: Sequence[Piece]) -> Pair:
        """Keys and values of `pieces`, in their order: views where they lie in one run, else copies."""
        runs: list[list[int]] = []
        for piece in pieces:
            if runs and runs[-1][1] == piece.start:
                runs[-1][1] = piece.stop
            else:
                runs.append([piece.start, piece.stop])
        cut = [[x[:, start:stop] for start, stop in runs] for x in self.buffers[layer]]
        keys, values = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in cut)
        return keys, values

    def move(self, source: Spans, target: Spans) -> None:
        """Copy slots of every layer; the two do not overlap."""
        for pair in self.buffers:
            for x in pair or ():
                held = torch.cat([x[:, start:stop] for start, stop in source], dim=1)
                for piece in pieces_of(target, chunk=None):
                    x[:, piece.start : piece.stop].copy_(held[:, piece.offset : piece.offset + piece.stop - piece.start])

    def commit(self, chunk: int, spans: Spans) -> None:
        """A chunk was written by all layers: nothing to do."""

    def drop(self, chunk: int) -> None:
        """A chunk was dropped: its slots are simply free."""

    def clear(self, *, free_buffers: bool) -> None:
        """Forget everything."""
        if free_buffers:
            self.buffers = [None] * len(self.buffers)

    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for pair in self.buffers for x in pair or ())

    def state(self) -> Any:
        """A copy of everything held."""
        return [pair and tuple(x.clone() for x in pair) for pair in self.buffers]

    def load_state(self, state: Any) -> None:
        """Take up a `state`, in the buffers at hand where they fit (what was captured keeps reading them)."""
        for layer, pair in enumerate(state):
            if pair is None:
                continue
            if self.buffers[layer] is None:
                self.buffers[layer] = tuple(torch.empty_like(x) for x in pair)
            for mine, x in zip(self.buffers[layer], pair, strict=True):
                mine.copy_(x)

    def _allocated(self, layer: int, pair: Pair) -> Pair:
        if self.buffers[layer] is None:
            self.buffers[layer] = tuple(x.new_zeros(x.shape[0], self.capacity, *x.shape[2:]) for x in pair)
        return self.buffers[layer]


class CodedStore:
    """Blobs of a codec, one per layer, chunk and side. The newest `hot_chunks` stay plain and are coded when they grow older.

    What a forward reads is restored into one scratch buffer that all layers share, so cold chunks exist as codes only.
    """

    in_place = False

    def __init__(self, num_layers: int, capacity: int, codec: KVCodec, *, hot_chunks: int = 0) -> None:
        self.capacity, self.codec, self.hot_chunks = capacity, codec, hot_chunks
        self._blobs: list[dict[int, tuple[Any, Any]]] = [{} for _ in range(num_layers)]
        self._hot: list[dict[int, Pair]] = [{} for _ in range(num_layers)]
        self._scratch: Pair | None = None

    def put(self, layer: int, chunk: int, pair: Pair, *, hot: bool = True) -> None:
        """Hold a chunk: as codes, or plain while it is among the newest, which it is not if it is not `hot`."""
        if hot and self.hot_chunks:
            self._hot[layer][chunk] = tuple(x.clone() for x in pair)
        else:
            self._blobs[layer][chunk] = self._encode(layer, pair)

    def commit(self, chunk: int, spans: Spans) -> None:
        """A chunk was put by all layers: code what is no longer among the newest."""
        for layer, hot in enumerate(self._hot):
            for old in sorted(hot)[: max(0, len(hot) - self.hot_chunks)]:
                self._blobs[layer][old] = self._encode(layer, hot.pop(old))

    def read(self, layer: int, pieces: Sequence[Piece], own: Pair | None = None) -> Pair:
        """Keys and values of whole chunks, in order, and `own` behind them: views of the scratch buffer, overwritten by the next read."""
        like = own or self.plain(layer, pieces[0].chunk)
        total = sum(p.stop - p.start for p in pieces) + (own[0].shape[1] if own else 0)
        keys, values = (x[:, :total] for x in self._room(like, total))
        at = 0
        for piece in pieces:
            stop = at + piece.stop - piece.start
            if piece.chunk in self._hot[layer]:
                for out, x in zip((keys, values), self._hot[layer][piece.chunk], strict=True):
                    out[:, at:stop].copy_(x)
            else:
                for out, blob, side in zip((keys, values), self._blobs[layer][piece.chunk], ("key", "value"), strict=True):
                    self.codec.decode_into(blob, out[:, at:stop], side=side)
            at = stop
        if own:
            keys[:, at:].copy_(own[0])
            values[:, at:].copy_(own[1])
        return keys, values

    def plain(self, layer: int, chunk: int) -> Pair:
        """Keys and values of one chunk, restored into memory of their own."""
        if chunk in self._hot[layer]:
            return self._hot[layer][chunk]
        key, value = self._blobs[layer][chunk]
        return self.codec.decode(key, side="key"), self.codec.decode(value, side="value")

    def drop(self, chunk: int) -> None:
        """Free a chunk."""
        for blobs, hot in zip(self._blobs, self._hot, strict=True):
            blobs.pop(chunk, None)
            hot.pop(chunk, None)

    def clear(self, *, free_buffers: bool) -> None:
        """Forget everything."""
        for held in (*self._blobs, *self._hot):
            held.clear()
        if hasattr(self.codec, "reset"):  # warm starts of the last video
            self.codec.reset()
        if free_buffers:
            self._scratch = None

    def num_bytes(self) -> int:
        """Bytes held: codes, hot chunks and the scratch buffer."""
        held = [x for chunks in self._blobs for pair in chunks.values() for blob in pair for x in _tensors(blob)]
        held += [x for chunks in self._hot for pair in chunks.values() for x in pair]
        kept = self.codec.num_bytes() if hasattr(self.codec, "num_bytes") else 0
        return kept + sum(x.nbytes for x in held) + sum(x.nbytes for x in self._scratch or ())

    def state(self) -> Any:
        """Everything held. Blobs and hot chunks are never written again, so they are shared, not copied; the codec says its own state."""
        own = self.codec.state() if hasattr(self.codec, "state") else None
        return [dict(x) for x in self._blobs], [dict(x) for x in self._hot], own

    def load_state(self, state: Any) -> None:
        """Take up a `state`."""
        blobs, hot, own = state
        self._blobs, self._hot = [dict(x) for x in blobs], [dict(x) for x in hot]
        if own is not None:
            self.codec.load_state(own)

    def _encode(self, layer: int, pair: Pair) -> tuple[Any, Any]:
        key, value = pair
        return self.codec.encode(key, side="key", layer=layer), self.codec.encode(value, side="value", layer=layer)

    def _room(self, like: Pair, total: int) -> Pair:
        fits = self._scratch is not None and all(
            (x.dtype, x.shape[0], x.shape[2:]) == (y.dtype, y.shape[0], y.shape[2:]) and x.shape[1] >= total
            for x, y in zip(self._scratch, like, strict=True)
        )
        if not fits:
            room = max(total, self.capacity)
            self._scratch = tuple(x.new_empty(x.shape[0], room, *x.shape[2:]) for x in like)
        return self._scratch


def _tensors(blob: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists, dicts and records."""
    if isinstance(blob, Tensor):
        return [blob]
    if isinstance(blob, dict):
        return [x for item in blob.values() for x in _tensors(item)]
    if isinstance(blob, (tuple, list)):
        return [x for item in blob for x in _tensors(item)]
    return [x for item in vars(blob).values() for x in _tensors(item)] if hasattr(blob, "__dict__") else []
