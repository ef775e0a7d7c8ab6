"""A budget of frames [sinks | chosen | recent], moved in time: Deep and Relax Forcing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_rewrite import Make, region, rewrite, split
from rcm.nets.kv_store import Pair
from rcm.nets.positions import at_frames
from rcm.nets.rope import turned_in_time
from rcm.rollout.eviction.base import CachePolicy, ChunkSpan
from rcm.rollout.eviction.frames import cached_frames, frame_tokens, within_frames

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over the ranks that hold other heads of the same tokens."""


class CompressedHistory(CachePolicy, ABC):
    """A policy with `sinks`, `budget` and `recent` frames. Chunks and recent frames stand at
    absolute positions; beyond the budget the frames between sinks and recent ones are thinned out
    to budget - sinks - recent, which then end right before the recent ones, the sinks right before
    them. Keys are kept rotated and turned on. Subclasses choose (`choose`) and say how far what was
    chosen moves (`moves`).
    """

    sinks: int
    budget: int
    recent: int
    reduce: Reduce | None
    ntk_time: float
    any_keys = False

    def _begin(self, prefix: str) -> None:
        """Check the counts, whose flags begin with `prefix`, and forget everything."""
        check_kinds(self, prefix=f"{prefix}_")
        if self.sinks < 0 or self.recent < 1:
            raise ConfigError(
                f"{prefix}_sink_frames={self.sinks} must be at least 0 and"
                f" {prefix}_recent_frames={self.recent} at least 1"
            )
        if self.sinks + self.recent > self.budget:
            raise ConfigError(
                f"{prefix}_sink_frames={self.sinks} and {prefix}_recent_frames={self.recent} do not"
                f" fit into {prefix}_budget_frames={self.budget}; set it to"
                f" {self.sinks + self.recent} or more"
            )
        self._sinks_moved, self._base = 0, self.sinks

    def capacity_frames(self, pattern: BlockPattern) -> int | None:
        return self.budget + max(pattern.first, pattern.chunk)

    def after(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> None:
        frames = cached_frames(branches[0])
        if frames <= self.budget:
            return
        per_frame, grid = frame_tokens(branches[0]), branches[0].chunks[0].positions.grid
        kept, tail = self.budget - self.sinks - self.recent, chunk.stop - self.recent
        start, aged = tail - kept, frames - self.recent
        shift = start - self.sinks - self._sinks_moved
        parts = [
            at_frames(range(low, high), grid)
            for low, high in ((start - self.sinks, start), (start, tail))
            if low < high
        ]
        for number, cache in enumerate(branches):
            index: list[Tensor] = []
            if kept:
                among = range(self.sinks, aged)
                index = self.choose(number, cache, frames=among, kept=kept * per_frame)
            split(cache, before=(self.sinks * per_frame, aged * per_frame))
            ids = region(cache, 0, aged * per_frame)
            if parts:
                rewrite(cache, ids, parts, self._make(index, shift, start, per_frame))
            else:
                cache.evict(ids)
        self._sinks_moved += shift
        self._base = start

    @abstractmethod
    def choose(self, branch: int, cache: KVCache, *, frames: range, kept: int) -> list[Tensor]:
        """Per layer, which `kept` tokens of the cached frames `frames` stay: ascending int64 [B or
        1, kept], counted from the first of them.
        """

    @abstractmethod
    def moves(self, index: Tensor, *, start: int, base: int, per_frame: int) -> Tensor | float:
        """How far the chosen, candidates in a row from `base`, move to begin at `start`."""

    def _make(self, index: list[Tensor], shift: int, start: int, per_frame: int) -> Make:
        split_at = self.sinks * per_frame

        def make(layer: int, keys: Tensor, values: Tensor) -> Pair:
            found = []
            if self.sinks:
                sinks = turned_in_time(keys[:, :split_at], shift, ntk=self.ntk_time)
                found.append((sinks, values[:, :split_at]))
            if index:
                at = index[layer].to(keys.device)
                keys, values = (_gathered(x[:, split_at:], at) for x in (keys, values))
                moves = self.moves(at, start=start, base=self._base, per_frame=per_frame)
                found.append((turned_in_time(keys, moves, ntk=self.ntk_time), values))
            keys, values = (torch.cat(both, dim=1) for both in zip(*found, strict=True))
            return keys, values

        return make

    def protected(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        return within_frames(branches[0], self.sinks)

    def state(self) -> Any:
        return self._sinks_moved, self._base

    def load_state(self, state: Any) -> None:
        self._sinks_moved, self._base = state


def summed(x: Tensor, reduce: Reduce | None) -> Tensor:
    """`x` itself, or its sum over the ranks."""
    return x if reduce is None else reduce(x)


def best_in_order(scores: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the largest `scores` [B, n], ascending; the first of equal ones."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [B or 1, C] of `x` [B, S, N, D]."""
    at = index.expand(x.shape[0], -1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return x.gather(1, at)
