"""Relax Forcing by its paper's rule (arXiv 2603.21366): a few blocks in the roles sink, history and
tail, with hybrid rotary indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_rewrite import lift
from rcm.nets.kv_view import CachedChunk
from rcm.rollout.eviction.base import CachePolicy, ChunkSpan, Placement
from rcm.rollout.eviction.compressed import Reduce
from rcm.rollout.eviction.frames import frame_tokens, num_frames, place_in_a_row
from rcm.rollout.eviction.relax_forcing import cosines

Chunks = Sequence[CachedChunk]


@dataclass
class RelaxForcingPaper(CachePolicy):
    """A chunk sees the first `sinks` blocks, the best `history` ones and the last `tail`.

    Candidates are the later half of the last `pool` blocks between sinks and tail (of an odd
    number, the larger half), which the cache holds for that. The score is cos(block, sinks) -
    `redundancy` cos(block, tail), of mean keys of layer 0 over tokens, averaged over the samples:
    the blocks of a batch are chosen together. Indices are hybrid: sinks keep their own, from 0; the
    chunk stands at the end of `horizon` frames and the tail right before it; history keeps its
    distance to the tail as far as the room behind the sinks allows. The release has another rule
    under the same name (`RelaxForcing`). Raises `ConfigError` for counts that do not fit.
    """

    sinks: int = 2
    history: int = 1
    tail: int = 1
    pool: int = 8
    redundancy: float = 0.5
    horizon: int = 21
    reduce: Reduce | None = None

    keys = "pre_rope"
    any_keys = absolute = False

    def __post_init__(self) -> None:
        check_kinds(self, prefix="rx_")
        if self.sinks < 1 or self.tail < 1 or self.history < 0:
            raise ConfigError(
                f"rx_sink_blocks={self.sinks} and rx_tail_blocks={self.tail} must be at least 1, "
                f"rx_history_blocks={self.history} at least 0"
            )
        if (self.pool + 1) // 2 < self.history:
            raise ConfigError(
                f"rx_pool_blocks={self.pool} leaves {(self.pool + 1) // 2} candidates for"
                f" rx_history_blocks={self.history}; set it to {2 * self.history} or more"
            )
        if not 0 <= self.redundancy < float("inf"):
            raise ConfigError(f"rx_redundancy={self.redundancy:g} must be at least 0")
        self._vectors: dict[int, Tensor] = {}
        self._hidden: tuple[int, ...] = ()

    def capacity_frames(self, pattern: BlockPattern) -> int | None:
        """See `CachePolicy`. `ConfigError` for a horizon shorter than what a chunk sees."""
        largest = max(pattern.first, pattern.chunk)
        seen = (self.sinks + self.history + self.tail + 1) * largest
        if seen > self.horizon:
            raise ConfigError(
                f"f_limit={self.horizon} frames are fewer than the {seen} that a chunk and the"
                " blocks it sees take; raise it"
            )
        return (self.sinks + self.pool + self.tail + 1) * largest

    def before(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> Placement:
        held, own = branches[0].chunks, chunk.stop - chunk.start
        now = min(self.horizon, chunk.stop) - own
        sinks, later = held[: self.sinks], held[self.sinks :]
        between, tail = later[: -self.tail], later[-self.tail :]
        chosen = self._chosen(sinks, tail, between[len(between) // 2 :])
        seen = (*sinks, *chosen, *tail)
        behind, limit = place_in_a_row(branches, sinks, first=0), now
        room = behind + sum(map(num_frames, (*chosen, *tail)))
        distance, at = {}, 0
        for entry in reversed(later):
            at += num_frames(entry)
            distance[entry.id] = at
        for entry in reversed(seen[len(sinks) :]):
            room -= num_frames(entry)
            limit = max(room, min(limit - num_frames(entry), now - distance[entry.id]))
            place_in_a_row(branches, [entry], first=limit)
        self._hidden = tuple(entry.id for entry in held if entry not in seen)
        for cache in branches if held else ():
            lift(cache, self._hidden, room=own * frame_tokens(cache))
        return Placement(tuple(entry.id for entry in seen), tuple(range(now, now + own)))

    def after(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> None:
        self.again(branches)
        ids = [entry.id for entry in branches[0].chunks]
        gone = ids[self.sinks : max(self.sinks, len(ids) - self.pool - self.tail)]
        for cache in branches:
            cache.evict(gone)
        for chunk_id in gone:
            del self._vectors[chunk_id]

    def forget(self, branches: Sequence[KVCache], chunks: Sequence[CachedChunk]) -> None:
        for chunk in chunks:
            del self._vectors[chunk.id]

    def again(self, branches: Sequence[KVCache]) -> None:
        """See `CachePolicy`: the vector of the newest block."""
        newest = branches[0].chunks[-1]
        keys, _ = branches[0].store.read(0, newest.pieces)
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        self._vectors[newest.id] = wide.mean(1).flatten(1)

    def _chosen(self, sinks: Chunks, tail: Chunks, candidates: Chunks) -> list[CachedChunk]:
        """The best candidates, in order; by the keys of the first branch, the conditional one."""
        if len(candidates) <= self.history:
            return list(candidates)
        known = self._vectors
        rows = [known[entry.id] for entry in candidates]
        ends = [
            torch.stack([known[entry.id] for entry in group]).mean(0) for group in (sinks, tail)
        ]
        cosine = cosines(torch.stack([*rows, *ends], dim=1), self.reduce).mean(0)
        score = cosine[: len(rows), -2] - self.redundancy * cosine[: len(rows), -1]
        best = score.sort(descending=True, stable=True).indices[: self.history].tolist()
        return [candidates[i] for i in sorted(best)]

    def protected(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        return tuple(entry.id for entry in branches[0].chunks[: self.sinks])

    def hidden(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        held = {entry.id for entry in branches[0].chunks}
        return tuple(i for i in self._hidden if i in held)

    def state(self) -> Any:
        return dict(self._vectors), self._hidden

    def load_state(self, state: Any) -> None:
        vectors, self._hidden = state
        self._vectors = dict(vectors)
