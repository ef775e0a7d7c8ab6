"""Deep Forcing (arXiv 2512.05081): between sinks and recent frames, keep tokens attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_view import CachedChunk, Observer
from rcm.rollout.eviction.base import ChunkSpan
from rcm.rollout.eviction.compressed import CompressedHistory, Reduce, best_in_order, summed
from rcm.rollout.eviction.frames import frame_tokens, num_frames


@dataclass
class DeepForcing(CompressedHistory):
    """`budget` frames [`sinks` | best tokens | `recent`], chosen per sample, layer and branch.

    While a chunk's context enters a cache that holds something, every cached key is scored by the
    sum over heads and queries of q . k / sqrt(D), the queries being those of the last `recent`
    frames. Layers that are not observed (`observation_layers` n > 0: only the last n are) keep the
    latest tokens; keys without a score count 0. What was chosen moves as one region, which is
    approximate for a mix of old and new tokens. `reduce`: under context parallelism a rank scores
    by its own heads; the sum over the ranks makes all choose alike. `ntk_time`: the network's NTK
    ratio of time. Raises `ConfigError` for counts that do not fit.
    """

    sinks: int = 10
    budget: int = 16
    recent: int = 4
    observation_layers: int = 0
    reduce: Reduce | None = None
    ntk_time: float = 1.0

    def __post_init__(self) -> None:
        self._begin("df")
        if self.observation_layers < 0:
            raise ConfigError(
                f"df_observation_layers={self.observation_layers} must be 0 (all layers) or a"
                " number of last layers"
            )
        self._queries: dict[tuple[int, int], Tensor] = {}
        self._scores: dict[tuple[int, int], Tensor] = {}

    def observers(self, branches: Sequence[KVCache]) -> tuple[Observer | None, ...]:
        if not branches[0].chunks:
            return ()
        return tuple(partial(self._observe, i, cache) for i, cache in enumerate(branches))

    def after(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> None:
        super().after(branches, chunk)
        self._scores.clear()

    def forget(self, branches: Sequence[KVCache], chunks: Sequence[CachedChunk]) -> None:
        """See `CachePolicy`: queries of other, older frames stay."""
        frames = sum(map(num_frames, chunks))
        self._queries = {
            key: known[:, : max(0, known.shape[1] - frames)] for key, known in self._queries.items()
        }

    def again(self, branches: Sequence[KVCache]) -> None:
        """See `CachePolicy`: scores serve the chunk after which tokens are chosen."""
        self._scores.clear()

    def _observe(self, branch: int, cache: KVCache, layer: int, q: Tensor, k: Tensor) -> None:
        """Score the cached keys of a layer by its recent queries: a sum of dot products is a dot
        product with the sum of the queries.
        """
        if self.observation_layers and layer < cache.num_layers - self.observation_layers:
            return
        wide = torch.promote_types(q.dtype, torch.float32)
        per_frame = q.unflatten(1, (-1, frame_tokens(cache))).to(wide).sum(2)
        known = self._queries.get((branch, layer))
        held = per_frame if known is None else torch.cat([known, per_frame], dim=1)
        recent = self._queries[branch, layer] = held[:, -self.recent :]
        past = k[:, : k.shape[1] - q.shape[1]].to(wide)
        scores = torch.einsum("bnd,bsnd->bs", recent.sum(1), past) / q.shape[-1] ** 0.5
        self._scores[branch, layer] = summed(scores, self.reduce)

    def choose(self, branch: int, cache: KVCache, *, frames: range, kept: int) -> list[Tensor]:
        per_frame = frame_tokens(cache)
        first, count = frames.start * per_frame, len(frames) * per_frame
        latest = torch.arange(count - kept, count)[None]
        return [
            self._best(self._scores.get((branch, layer)), first, count, kept, otherwise=latest)
            for layer in range(cache.num_layers)
        ]

    def moves(self, index: Tensor, *, start: int, base: int, per_frame: int) -> Tensor | float:
        """See `CompressedHistory`: all alike."""
        return start - base

    @staticmethod
    def _best(
        scores: Tensor | None, first: int, count: int, kept: int, *, otherwise: Tensor
    ) -> Tensor:
        if scores is None:
            return otherwise
        known = scores[:, first : first + count]
        padded = torch.nn.functional.pad(known, (0, count - known.shape[1]))
        return best_in_order(padded, kept)

    def state(self) -> Any:
        """See `CachePolicy`; scores live within one chunk only."""
        return super().state(), dict(self._queries)

    def load_state(self, state: Any) -> None:
        moved, queries = state
        super().load_state(moved)
        self._queries, self._scores = dict(queries), {}
