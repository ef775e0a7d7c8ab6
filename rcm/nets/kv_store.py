"""Where plain cached keys and values lie: buffers used as a ring. Those of a codec: `kv_coded`.

A place is a list of spans [start, stop) of token slots. Chunks take free slots, wherever they are,
so dropping one costs nothing and the next takes its slots: a ring whose reader does not care for
the order of the keys (softmax does not).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

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
    """Plain keys and values, per layer two buffers [B, capacity, N, D], allocated by the first
    write in its dtype.

    Slots that were never written hold zeros: a graph that reads a whole buffer must not meet a NaN.
    """

    in_place = True

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.buffers: list[Pair | None] = [None] * num_layers

    @property
    def ready(self) -> bool:
        """Whether captured passes find all that they read."""
        return True

    def write(self, layer: int, spans: Spans, pair: Pair) -> None:
        """Put the tokens of `pair` (keys, values [B, L, N, D]) into `spans`."""
        for buffer, x in zip(self._room(layer, pair), pair, strict=True):
            if (x.dtype, x.shape[0], x.shape[2:]) != (
                buffer.dtype,
                buffer.shape[0],
                buffer.shape[2:],
            ):
                raise ValueError(
                    f"cache buffers are {tuple(buffer.shape)} {buffer.dtype}, got {tuple(x.shape)}"
                    f" {x.dtype}; reset(free_buffers=True) before another batch"
                )
            for piece in pieces_of(spans, chunk=None):
                buffer[:, piece.start : piece.stop].copy_(
                    x[:, piece.offset : piece.offset + piece.stop - piece.start]
                )

    def read(self, layer: int, pieces: Sequence[Piece]) -> Pair:
        """Keys and values of `pieces`, in their order: views where they lie in one run, else
        copies.
        """
        runs: list[list[int]] = []
        for piece in pieces:
            if runs and runs[-1][1] == piece.start:
                runs[-1][1] = piece.stop
            else:
                runs.append([piece.start, piece.stop])
        cut = [[x[:, start:stop] for start, stop in runs] for x in self.allocated(layer)]
        keys, values = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in cut)
        return keys, values

    def move(self, source: Spans, target: Spans) -> None:
        """Copy slots of every layer; the two do not overlap."""
        for pair in self.buffers:
            for x in pair or ():
                held = torch.cat([x[:, start:stop] for start, stop in source], dim=1)
                for piece in pieces_of(target, chunk=None):
                    x[:, piece.start : piece.stop].copy_(
                        held[:, piece.offset : piece.offset + piece.stop - piece.start]
                    )

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
        """Take up a `state`, in the buffers at hand where they fit (what was captured keeps reading
        them).
        """
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
