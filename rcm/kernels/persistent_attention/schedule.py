"""Who computes what in the persistent kernel, and the tile sizes to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

CONSUMER_ROWS = 64


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the Hopper kernel; the defaults are those of 16-bit operands.

    consumers     warpgroups of 64 query rows, 2 or 3.
    block_n       keys of a tile, 64 or 128; three consumers have registers for 64.
    stages        slots of the rings of keys and of values.
    two_level     every product P V is added in float32; else the tensor cores accumulate.
    """

    consumers: int = 2
    block_n: int = 128
    stages: int = 2
    two_level: bool = False

    @property
    def rows(self) -> int:
        """Query rows of a program's tile."""
        return CONSUMER_ROWS * self.consumers

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread: of a consumer, and at launch."""
        return (240, 168) if self.consumers == 2 else (160, 128)


class Plan(NamedTuple):
    """`whole` query tiles for every program, then for the first `sharers` of them an equal share of
    the `remaining` ones, each of `blocks` key tiles.
    """

    whole: int
    remaining: int
    blocks: int
    tiles_per_head: int
    sharers: int


def make_plan(*, q_len: int, kv_len: int, pairs: int, tiles: Tiles, programs: int) -> Plan:
    """The work of `pairs` (batch x heads) on `programs` processors."""
    tiles_per_head = -(-q_len // tiles.rows)
    whole, remaining = divmod(tiles_per_head * pairs, programs)
    blocks = -(-kv_len // tiles.block_n)
    sharers = sharers_of(remaining, blocks=blocks, programs=programs)
    return Plan(whole, remaining, blocks, tiles_per_head, sharers)


JOB = 2.5
"""Key tiles whose time it takes to begin and end a job (from calls of 1,560 queries, one H200)."""


def sharers_of(remaining: int, *, blocks: int, programs: int) -> int:
    """Programs that share the `remaining` query tiles: all, of which many then have pieces of two
    tiles, or as many as have a piece of one tile each.
    """
    if not remaining:
        return programs
    per_tile = programs // remaining
    one_job = -(-blocks // per_tile) + JOB
    two_jobs = -(-remaining * blocks // programs) + 2 * JOB
    return remaining * per_tile if one_job <= two_jobs else programs
