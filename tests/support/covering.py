"""Covering arrays: few rows in which every two values of different factors meet, those that exclude
each other apart.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]
"""(factor, value) of two factors, in the order of the factors."""


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    """All pairs that a row holds."""
    return set(itertools.combinations(row.items(), 2))


def all_pairs(factors: Mapping[str, Sequence[str]], *, allowed: Callable[[Pair], bool]) -> set[Pair]:
    """Every pair that can be."""
    named = [[(factor, value) for value in values] for factor, values in factors.items()]
    return {pair for a, b in itertools.combinations(named, 2) for pair in itertools.product(a, b) if allowed(pair)}


def covering(factors: Mapping[str, Sequence[str]], *, allowed: Callable[[Pair], bool], seed: int = 0, tries: int = 12) -> list[Row]:
    """Rows that hold all pairs: each is the best of `tries`, grown around a pair that is missing
    yet. The first value of a factor is taken where none is better, so put the cheap one there.
    """
    draw, place = random.Random(seed), {factor: i for i, factor in enumerate(factors)}
    missing, rows = all_pairs(factors, allowed=allowed), []
    while missing:
        starts = sorted(missing)
        grown = [_grown(draw, factors, place, draw.choice(starts), missing, allowed) for _ in range(tries)]
        best = max((row for row in grown if row), key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        rows.append(best)
    return rows


def _grown(draw: random.Random, factors, place: dict[str, int], start: Pair, missing: set[Pair], allowed) -> Row:
    row = dict(start)
    for factor in draw.sample([name for name in place if name not in row], len(place) - 2):
        best, gain = None, -1
        before = [(place[name] < place[factor], (name, value)) for name, value in row.items()]
        for value in factors[factor]:
            mine = (factor, value)
            new = [(other, mine) if first else (mine, other) for first, other in before]
            found = sum(pair in missing for pair in new)
            if found > gain and all(map(allowed, new)):
                best, gain = value, found
        if best is None:  # this start leaves no value here
            return {}
        row[factor] = best
    return {name: row[name] for name in place}
