"""Which kernel serves a call, with which tiles."""

from __future__ import annotations

from dataclasses import dataclass

from rcm.kernels.persistent_attention.schedule import Tiles

PERSISTENT = Tiles(stages=4, two_level=True)
SHORT = 4000
"""Keys up to which programs with one tile each are faster than persistent ones (README.md)."""


@dataclass(frozen=True)
class PortableTiles:
    """Tile sizes of the Triton kernel."""

    block_m: int = 128
    block_n: int = 128
    num_warps: int = 8
    stages: int = 3


def chosen_tiles(*, kv_len: int) -> Tiles | PortableTiles:
    """The kernel and the tiles that were fastest for such a call."""
    return PortableTiles(64, 128, 4, 2) if kv_len < SHORT else PERSISTENT
