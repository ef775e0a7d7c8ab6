"""Which key tiles each query tile visits, and in which order query tiles start: host integers, made
into small device tables once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise, takewhile

import torch
from torch import Tensor

from rcm.kernels.flash_jvp.validation import Problem
from rcm.kernels.masks import Interval, Intervals, MaskSpec, QueryTile

PLAIN, TANGENT, EDGE = 0, 1, 2
"""Kinds of key tiles: interior without key tangents, interior with them, boundary (predicate
applied, tangents loaded where they exist).
"""
KIND_COST = (4, 6, 6.5)
"""Relative cost of a key tile: its matrix products, and the predicate at a boundary."""


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut: query rows and keys per tile, warps, pipeline depth. Never a function
    of the sequence length.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Piece:
    """`count` key tiles from `start`; only keys below `stop` exist for a boundary piece."""

    kind: int
    start: int
    count: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Device tables of one (mask, tile sizes, tangent_start).

    `tiles` int32 [num_tiles, 8]: first query, then the offsets into `pieces` where the kinds PLAIN,
    TANGENT, EDGE begin and where EDGE ends; longest tiles first. `pieces` int32 [*, 4]: start,
    count, stop, 0. `rows` int32 [q_len, 6]: the three key intervals of every query, needed only
    where the rows of a tile differ (`edge_mode` 2; a dummy otherwise). `classes` has a bit per kind
    that occurs.
    """

    tiles: Tensor
    pieces: Tensor
    rows: Tensor
    classes: int
    edge_mode: int

    @property
    def num_tiles(self) -> int:
        """Query tiles per batch entry and head."""
        return self.tiles.shape[0]


def cover(
    interval: Interval, common: Intervals, *, tangent_start: int, block_n: int
) -> Iterator[Piece]:
    """Cut one elementary key interval of a query tile (each row sees all of it or nothing) into
    pieces of `block_n`-wide tiles.

    A tile is interior if every row sees all of it and it lies on one side of `tangent_start`; every
    other tile is a boundary.
    """
    position, stop = interval
    while position < stop:
        limit = next((c[1] for c in common if c[0] <= position < c[1]), position)
        if position < tangent_start:
            limit = min(limit, tangent_start)
        count = (limit - position) // block_n
        if count > 0:
            yield Piece(TANGENT if position >= tangent_start else PLAIN, position, count, limit)
        else:
            count = 1
            yield Piece(EDGE, position, count, stop)
        position += count * block_n


def tile_pieces(
    mask: MaskSpec, *, block_m: int, block_n: int, tangent_start: int
) -> list[tuple[int, list[Piece]]]:
    """(first query, pieces sorted by kind) of every query tile, the most expensive tile first."""
    planned = []
    for tile in mask.kv_intervals(block_m):
        elementary = _elementary(mask, tile)
        pieces = [
            p
            for interval in elementary
            for p in cover(interval, tile.common, tangent_start=tangent_start, block_n=block_n)
        ]
        planned.append(
            (tile.q_start, sorted(_join_runs(pieces, block_n), key=lambda piece: piece.kind))
        )
    return sorted(planned, key=lambda item: -sum(KIND_COST[p.kind] * p.count for p in item[1]))


def plan_of(problem: Problem, tiles: Tiles) -> Plan:
    """The tables of a launch, on the device of the problem."""
    return make_plan(
        problem.mask,
        block_m=tiles.block_m,
        block_n=tiles.block_n,
        tangent_start=problem.first_tangent_key,
        device=problem.q.device,
    )


@lru_cache(maxsize=128)
def make_plan(
    mask: MaskSpec, *, block_m: int, block_n: int, tangent_start: int, device: torch.device
) -> Plan:
    """Tables for a kernel with tiles of `block_m` x `block_n`; keys below `tangent_start` have no
    tangent.
    """
    planned = tile_pieces(mask, block_m=block_m, block_n=block_n, tangent_start=tangent_start)
    tiles: list[tuple[int, ...]] = []
    table: list[tuple[int, ...]] = []
    for q_start, pieces in planned:
        begins = [
            len(table) + sum(piece.kind < kind for piece in pieces)
            for kind in (PLAIN, TANGENT, EDGE)
        ]
        table += [(piece.start, piece.count, piece.stop, 0) for piece in pieces]
        tiles.append((q_start, *begins, len(table), 0, 0, 0))
    straddles = any(tile.straddles for tile in mask.kv_intervals(block_m))
    kinds = {piece.kind for _, pieces in planned for piece in pieces}
    return Plan(
        tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
        pieces=torch.tensor(table, dtype=torch.int32, device=device),
        rows=(
            _row_table(mask).to(device)
            if straddles
            else torch.zeros(1, 6, dtype=torch.int32, device=device)
        ),
        classes=sum(1 << kind for kind in kinds),
        edge_mode=0 if EDGE not in kinds else 2 if straddles else 1,
    )


def _elementary(mask: MaskSpec, tile: QueryTile) -> list[Interval]:
    """The union of a tile, cut wherever an interval of one of its rows begins or ends."""
    if not tile.straddles:
        return list(tile.union)
    segments = mask.row_segments()
    first = bisect_right(segments, tile.q_start, key=lambda segment: segment.q_stop)
    overlapping = takewhile(
        lambda segment: segment.q_start < tile.q_stop, islice(segments, first, None)
    )
    cuts = {edge for segment in overlapping for interval in segment.intervals for edge in interval}
    found: list[Interval] = []
    for start, stop in tile.union:
        edges = sorted({start, stop} | {cut for cut in cuts if start < cut < stop})
        found += pairwise(edges)
    return found


def _join_runs(pieces: list[Piece], block_n: int) -> list[Piece]:
    """Merge consecutive boundary tiles of the same interval into one run."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            last
            and last.kind == piece.kind == EDGE
            and last.stop == piece.stop
            and last.start + last.count * block_n == piece.start
        ):
            joined[-1] = replace(last, count=last.count + piece.count)
        else:
            joined.append(piece)
    return joined


def _row_table(mask: MaskSpec) -> Tensor:
    table = torch.zeros(mask.q_len, 3, 2, dtype=torch.int32)
    for segment in mask.row_segments():
        table[segment.q_start : segment.q_stop, : len(segment.intervals)] = torch.tensor(
            segment.intervals, dtype=torch.int32
        )
    return table.flatten(1)
