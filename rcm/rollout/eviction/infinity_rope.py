"""Infinity-RoPE (arXiv 2511.20649): positions relative to the new block, flushes, cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.kv_cache import KVCache
from rcm.rollout.eviction.base import CachePolicy, ChunkSpan, Placement
from rcm.rollout.eviction.frames import num_frames, place_in_a_row


@dataclass
class InfinityRope(CachePolicy):
    """The last `blocks` blocks stay, the first `sinks` of the video among them. The n frames of a
    chunk stand at horizon - n to horizon - 1, what it sees in a row before them; positions below 0
    become 0.

    A flush after a block keeps the sinks and that block alone: on request, or after every
    `flush_interval` blocks (0: never). A cut at a block (`cuts`, or on request) moves that block's
    own frames `cut_delta` further while it is made (one-frame chunks only if `cut_single_frames`),
    so that it sees the past across a gap, and flushes after it. Raises `ConfigError` for counts
    that do not fit.
    """

    blocks: int = 6
    sinks: int = 1
    horizon: int = 21
    flush_interval: int = 0
    cut_delta: int = 21
    cut_single_frames: bool = True
    cuts: frozenset[int] = frozenset()

    keys = "pre_rope"
    any_keys = absolute = False

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0 <= self.sinks < self.blocks:
            raise ConfigError(
                f"ir_sink_blocks={self.sinks} must be at least 0 and below"
                f" cache_blocks={self.blocks}"
            )
        if self.horizon < 2:
            raise ConfigError(f"f_limit={self.horizon} must be at least 2 frames")
        if self.flush_interval < 0 or self.cut_delta < 0:
            raise ConfigError(
                f"flush_interval_blocks={self.flush_interval} and rope_cut_delta={self.cut_delta}"
                " must be 0 (off) or positive"
            )
        self._wants_cut = self._cutting = self._wants_flush = False

    def cut(self) -> None:
        """Let the next block that is begun be the first of a scene."""
        self._wants_cut = True

    def flush(self) -> None:
        """Forget the past, sinks excepted, after the block that is finished next."""
        self._wants_flush = True

    def capacity_frames(self, pattern: BlockPattern) -> int | None:
        return (self.blocks + 1) * max(pattern.first, pattern.chunk)

    def before(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> Placement:
        self._cutting, self._wants_cut = self._wants_cut or chunk.block in self.cuts, False
        held, own = branches[0].chunks, chunk.stop - chunk.start
        past = sum(map(num_frames, held))
        place_in_a_row(branches, held, first=self.horizon - own - past, lowest=0)
        moved = self.cut_delta if self._cutting and (own > 1 or self.cut_single_frames) else 0
        return Placement(
            tuple(entry.id for entry in held),
            tuple(max(0, t) + moved for t in range(self.horizon - own, self.horizon)),
        )

    def after(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> None:
        ids = [entry.id for entry in branches[0].chunks]
        due = self.flush_interval > 0 and (chunk.block + 1) % self.flush_interval == 0
        if self._cutting or self._wants_flush or due:
            gone = ids[self.sinks : -1]
        else:
            gone = ids[self.sinks : self.sinks + max(0, len(ids) - self.blocks)]
        self._cutting = self._wants_flush = False
        for cache in branches:
            cache.evict(gone)

    def protected(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        return tuple(entry.id for entry in branches[0].chunks[: self.sinks])

    def state(self) -> Any:
        return self._wants_cut, self._cutting, self._wants_flush

    def load_state(self, state: Any) -> None:
        self._wants_cut, self._cutting, self._wants_flush = state
