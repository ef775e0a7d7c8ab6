"""Rolling Sink (arXiv 2602.07775): the first blocks return in turn, to and fro, as sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_rewrite import lift
from rcm.rollout.eviction.base import CachePolicy, ChunkSpan, Placement
from rcm.rollout.eviction.frames import frame_tokens, num_frames


@dataclass
class RollingSink(CachePolicy):
    """The first `total` blocks stay; later chunks see `sinks` of them and the `recent` newest.

    Block `total` + p (p >= 1) takes, with m = p mod 2 total, the sinks p, p + 1, ... modulo `total`
    for m < total, and else going down from total - 1 - (p mod total), each of them with its frames
    in reverse order. Sinks stand in a row that ends right before the first recent frame; recent and
    own frames are absolute. Needs sinks + recent == total: with fewer, the release takes its bank
    anew from blocks that have rolled already. Raises `ConfigError`.
    """

    total: int = 6
    sinks: int = 5
    recent: int = 1

    keys = "pre_rope"
    any_keys = False

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.recent < 1 or self.sinks < 1:
            raise ConfigError(
                f"sink_blocks={self.sinks} and recent_blocks={self.recent} must both be at least 1"
            )
        if self.sinks + self.recent != self.total:
            raise ConfigError(
                f"sink_blocks={self.sinks} and recent_blocks={self.recent} must add up to"
                f" total_blocks={self.total}; set total_blocks to {self.sinks + self.recent}"
            )
        self._hidden: tuple[int, ...] = ()

    def capacity_frames(self, pattern: BlockPattern) -> int | None:
        """See `CachePolicy`: the first blocks, the recent ones and the one being made."""
        return (self.total + self.recent + 1) * max(pattern.first, pattern.chunk)

    def before(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> Placement:
        own = tuple(range(chunk.start, chunk.stop))
        held = branches[0].chunks
        ids = [entry.id for entry in held]
        phase = chunk.block - self.total
        if phase < 1:
            return Placement(tuple(ids), own)
        sinks, backwards = self.rolled(phase)
        recent = held[-self.recent :]
        at = chunk.start - sum(map(num_frames, recent)) - sum(num_frames(held[i]) for i in sinks)
        placed = {}
        for i in sinks:
            row = tuple(range(at, at + num_frames(held[i])))
            placed[held[i].id] = row[::-1] if backwards else row
            at += len(row)
        for entry in recent:
            placed[entry.id] = tuple(range(at, at + num_frames(entry)))
            at += num_frames(entry)
        self._hidden = tuple(i for i in ids if i not in placed)
        for cache in branches:
            cache.place(placed)
            lift(cache, self._hidden, room=len(own) * frame_tokens(cache))
        return Placement(tuple(placed), own)

    def rolled(self, phase: int) -> tuple[list[int], bool]:
        """Sinks of `phase` >= 1, in order, and whether their frames run backwards."""
        turn = phase % self.total
        if phase % (2 * self.total) < self.total:
            return [(turn + j) % self.total for j in range(self.sinks)], False
        return [(self.total - 1 - turn - j) % self.total for j in range(self.sinks)], True

    def after(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> None:
        ids = [entry.id for entry in branches[0].chunks]
        for cache in branches:
            cache.evict(ids[self.total : max(self.total, len(ids) - self.recent)])

    def protected(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        """See `CachePolicy`: all the first blocks, once they roll."""
        ids = [entry.id for entry in branches[0].chunks]
        return tuple(ids[: self.total if len(ids) > self.total else self.sinks])

    def hidden(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        held = {entry.id for entry in branches[0].chunks}
        return tuple(i for i in self._hidden if i in held)

    def state(self) -> Any:
        return self._hidden

    def load_state(self, state: Any) -> None:
        self._hidden = state
