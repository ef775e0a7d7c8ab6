"""Any mask as few dense rectangles: an exact cover of the visible (query, key) pairs, and its
grouping into batched dense calls.

The flash backward needs only O and the log-sum-exp of whole rows, so it is a sum over any disjoint
cover of the visible pairs: dQ adds over the key ranges of a row, dK and dV over the query ranges of
a column. Block masks are staircases; halving them gives squares that grow away from the diagonal, a
few sizes in all, and rectangles of one size at regular distances are one batched call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, product
from typing import NamedTuple

from rcm.kernels.masks import MaskSpec

TILE = 128
"""Edge of the square of pairs that a fused backward works on at once; costs below are in such
squares.
"""


class Rectangle(NamedTuple):
    """Queries `[q_start, q_stop)` that all see the keys `[k_start, k_stop)`."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


@dataclass(frozen=True, order=True)
class Comb:
    """`count` rectangles of `q_len` x `k_len`; the i-th starts at (`q_start + i q_step`, `k_start +
    i k_step`) and overlaps no other.
    """

    q_start: int
    q_len: int
    q_step: int
    k_start: int
    k_len: int
    k_step: int
    count: int

    def rectangles(self) -> Iterator[Rectangle]:
        """The rectangles one by one."""
        for i in range(self.count):
            q, k = self.q_start + i * self.q_step, self.k_start + i * self.k_step
            yield Rectangle(q, q + self.q_len, k, k + self.k_len)


@lru_cache(maxsize=256)
def combs(mask: MaskSpec) -> tuple[Comb, ...]:
    """The visible pairs of `mask`, each exactly once, as batched dense calls: the cheapest of a few
    covers by `cost`.
    """
    cells = _Cells(mask)
    covers = [
        _halved(cells, halve_rows=rows, halve_columns=columns)
        for rows, columns in product((False, True), repeat=2)
    ]
    covers += [_merged(cover) for cover in covers]
    return min((_grouped(cover) for cover in covers), key=cost)


def cost(calls: tuple[Comb, ...]) -> float:
    """Estimated time of the calls in tiles of `TILE` x `TILE` pairs.

    Beside the tiles: reading, writing and adding up rows costs about a tile per 128 rows, the last
    wave of programs leaves a device idle for half a column of tiles, and a launch costs some fixed
    time. Fitted by arithmetic to 12 heads of 128 on an H200; only the order of alternatives
    matters.
    """
    total = 0.0
    for call in calls:
        q_tiles, k_tiles = -(-call.q_len // TILE), -(-call.k_len // TILE)
        total += (
            call.count * (q_tiles * k_tiles + 1.3 * (q_tiles + 2 * k_tiles)) + 5.5 * q_tiles + 60
        )
    return total


class _Cells:
    """The mask as a small bool matrix: rows are runs of queries with equal keys, columns the keys
    between any two interval ends.
    """

    def __init__(self, mask: MaskSpec) -> None:
        segments = mask.row_segments()
        self.rows = [(segment.q_start, segment.q_stop) for segment in segments]
        self.cuts = sorted(
            {edge for segment in segments for interval in segment.intervals for edge in interval}
        )
        self.columns = list(pairwise(self.cuts))
        self._sums = [[0] * (len(self.columns) + 1)]
        for segment in segments:
            seen = [0] * len(self.columns)
            for start, stop in segment.intervals:
                first, last = bisect_left(self.cuts, start), bisect_left(self.cuts, stop)
                seen[first:last] = [1] * (last - first)
            self._sums.append(
                [
                    above + here
                    for above, here in zip(self._sums[-1], accumulate(seen, initial=0), strict=True)
                ]
            )

    def visible(self, top: int, bottom: int, left: int, right: int) -> int:
        """Number of visible cells in rows [top, bottom) and columns [left, right)."""
        return (
            self._sums[bottom][right]
            - self._sums[top][right]
            - self._sums[bottom][left]
            + self._sums[top][left]
        )

    def rectangle(self, top: int, bottom: int, left: int, right: int) -> Rectangle:
        """Token ranges of a block of cells."""
        return Rectangle(
            self.rows[top][0],
            self.rows[bottom - 1][1],
            self.columns[left][0],
            self.columns[right - 1][1],
        )


def _halved(cells: _Cells, *, halve_rows: bool, halve_columns: bool) -> list[Rectangle]:
    """Cut at powers of two until every part is full or empty, after an optional first cut through
    the middle (two packed halves).
    """
    found: list[Rectangle] = []

    def visit(top: int, bottom: int, left: int, right: int) -> None:
        seen = cells.visible(top, bottom, left, right)
        if seen == 0:
            return
        if seen == (bottom - top) * (right - left):
            found.append(cells.rectangle(top, bottom, left, right))
            return
        for rows, columns in product(_power_cut(top, bottom), _power_cut(left, right)):
            visit(*rows, *columns)

    for rows, columns in product(
        _middle_cut(len(cells.rows), halve_rows), _middle_cut(len(cells.columns), halve_columns)
    ):
        visit(*rows, *columns)
    return found


def _middle_cut(size: int, wanted: bool) -> list[tuple[int, int]]:
    return [(0, size // 2), (size // 2, size)] if wanted and size > 1 else [(0, size)]


def _power_cut(start: int, stop: int) -> list[tuple[int, int]]:
    """Cut behind the largest power of two below the size, so that parts of one level are alike."""
    size = stop - start
    if size == 1:
        return [(start, stop)]
    middle = start + (1 << ((size - 1).bit_length() - 1))
    return [(start, middle), (middle, stop)]


def _merged(rectangles: list[Rectangle]) -> list[Rectangle]:
    """Neighbours joined: first those of equal rows, then those of equal columns."""
    for own, other in ((0, 2), (2, 0)):
        joined: list[Rectangle] = []
        for rectangle in sorted(rectangles, key=lambda r: (r[own : own + 2], r[other])):
            last = joined[-1] if joined else None
            if (
                last
                and last[own : own + 2] == rectangle[own : own + 2]
                and last[other + 1] == rectangle[other]
            ):
                edges = list(last)
                edges[other + 1] = rectangle[other + 1]
                joined[-1] = Rectangle(*edges)
            else:
                joined.append(rectangle)
        rectangles = joined
    return rectangles


def _grouped(rectangles: list[Rectangle]) -> tuple[Comb, ...]:
    """Rectangles of one size gathered into the longest regular sequences; those that cover most
    rows first.
    """
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for r in rectangles:
        sizes.setdefault((r.q_stop - r.q_start, r.k_stop - r.k_start), []).append(
            (r.q_start, r.k_start)
        )
    found = []
    for (q_len, k_len), corners in sizes.items():
        left = sorted(corners)
        while left:
            sequence = _longest_sequence(left, q_len=q_len, k_len=k_len)
            (q, k), count = sequence[0], len(sequence)
            q_step, k_step = (
                (sequence[1][0] - q, sequence[1][1] - k) if count > 1 else (q_len, k_len)
            )
            found.append(Comb(q, q_len, q_step, k, k_len, k_step, count))
            left = [corner for corner in left if corner not in sequence]
    return tuple(sorted(found, key=lambda c: (-c.count * c.q_len, c)))


def _longest_sequence(
    corners: list[tuple[int, int]], *, q_len: int, k_len: int
) -> list[tuple[int, int]]:
    """The longest sequence from the first corner in equal steps that leave no two rectangles a row
    or a column in common.
    """
    (q, k), present, best = corners[0], set(corners), corners[:1]
    for next_q, next_k in corners[1:]:
        q_step, k_step = next_q - q, next_k - k
        if q_step < q_len or k_step < k_len:
            continue
        sequence = [(q, k)]
        while (following := (sequence[-1][0] + q_step, sequence[-1][1] + k_step)) in present:
            sequence.append(following)
        best = max(best, sequence, key=len)
    return best
