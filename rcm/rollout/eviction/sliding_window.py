"""The last blocks and, beside them, the first ones as sinks, all at absolute positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.kv_cache import KVCache
from rcm.rollout.eviction.base import CachePolicy, ChunkSpan, Placement


@dataclass(frozen=True)
class SlidingWindow(CachePolicy):
    """A chunk sees the last `blocks` blocks, its own included, and the first `sinks` blocks.

    `keep` leaves what it no longer sees in the cache: training replays earlier chunks against what
    they saw. Otherwise such blocks are dropped before the next chunk is made, so memory is bounded
    by blocks + sinks. Positions are absolute and grow without limit; rotary attention knows
    differences only. Raises `ConfigError` unless blocks >= 1 and sinks >= 0.
    """

    blocks: int
    sinks: int = 0
    keep: bool = False

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.blocks < 1:
            raise ConfigError(
                f"window={self.blocks} blocks: a chunk sees at least its own; set window to 1 or"
                " more, or leave it out"
            )
        if self.sinks < 0:
            raise ConfigError(f"sinks={self.sinks} must be 0 or more blocks")

    def capacity_frames(self, pattern: BlockPattern) -> int | None:
        """See `CachePolicy`; None if everything is kept."""
        return None if self.keep else (self.blocks + self.sinks) * max(pattern.first, pattern.chunk)

    def before(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> Placement:
        hidden = self.hidden(branches)
        visible = tuple(held.id for held in branches[0].chunks if held.id not in hidden)
        if not self.keep:
            for cache in branches:
                cache.evict(hidden)
        return Placement(visible, tuple(range(chunk.start, chunk.stop)))

    def hidden(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        """See `CachePolicy`: what lies out of the window of a chunk that follows."""
        ids = [held.id for held in branches[0].chunks]
        recent = len(ids) - (self.blocks - 1)
        return tuple(
            held
            for at, held in enumerate(ids)
            if at < recent and not self._is_sink(branches[0], at)
        )

    def protected(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        return tuple(
            held.id for at, held in enumerate(branches[0].chunks) if self._is_sink(branches[0], at)
        )

    def _is_sink(self, cache: KVCache, at: int) -> bool:
        # the first blocks are never dropped, so they stay the first ones that the cache holds
        return at < self.sinks
