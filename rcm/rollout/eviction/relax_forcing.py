"""Relax Forcing as released: keep past frames like the recent ones and unlike each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.nets.kv_cache import KVCache
from rcm.rollout.eviction.compressed import CompressedHistory, Reduce, best_in_order, summed
from rcm.rollout.eviction.frames import frame_tokens


@dataclass
class RelaxForcing(CompressedHistory):
    """`budget` frames [`sinks` | best ones | `recent`], chosen per sample and branch by layer 0.

    A frame's vector is the mean of its keys over tokens, heads laid side by side. With w =
    `alignment_weight` its score is w cos(frame, mean of the recent frames) + (1 - w) (1 - its mean
    cosine with the other candidates). Chosen frames keep their order and each moves to its place in
    a row. `reduce`, `ntk_time`: as `DeepForcing`. Another rule than the paper's
    (`RelaxForcingPaper`). Raises `ConfigError` for counts that do not fit or a weight outside [0,
    1].
    """

    sinks: int = 4
    budget: int = 16
    recent: int = 4
    alignment_weight: float = 0.5
    reduce: Reduce | None = None
    ntk_time: float = 1.0

    def __post_init__(self) -> None:
        self._begin("rx")
        if not 0 <= self.alignment_weight <= 1:
            raise ConfigError(f"rx_alignment_weight={self.alignment_weight:g} must lie in [0, 1]")

    def choose(self, branch: int, cache: KVCache, *, frames: range, kept: int) -> list[Tensor]:
        per_frame = frame_tokens(cache)
        keys, _ = cache.store.read(0, [piece for chunk in cache.chunks for piece in chunk.pieces])
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        vectors = wide.unflatten(1, (-1, per_frame)).mean(2).flatten(2)
        candidates = vectors[:, frames.start : frames.stop]
        tail = vectors[:, frames.stop :].mean(1, keepdim=True)
        score = self._scores(cosines(torch.cat([candidates, tail], dim=1), self.reduce))
        best = best_in_order(score, kept // per_frame)
        tokens = best[:, :, None] * per_frame + torch.arange(per_frame, device=best.device)
        return [tokens.flatten(1)] * cache.num_layers

    def moves(self, index: Tensor, *, start: int, base: int, per_frame: int) -> Tensor | float:
        """See `CompressedHistory`: every frame to its place."""
        places = torch.arange(index.shape[1], device=index.device) // per_frame
        return (start + places) - (base + index // per_frame)

    def _scores(self, cosine: Tensor) -> Tensor:
        """[B, n] from the cosines [B, n + 1, n + 1] of n candidates and the tail."""
        count = cosine.shape[1] - 1
        among = cosine[:, :count, :count].sum(2) - 1
        return self.alignment_weight * cosine[:, :count, count] + (1 - self.alignment_weight) * (
            1 - among / max(count - 1, 1)
        )


def cosines(vectors: Tensor, reduce: Reduce | None) -> Tensor:
    """Cosines [B, n, n] of `vectors` [B, n, C], of which each rank may hold other channels."""
    gram = summed(vectors @ vectors.transpose(1, 2), reduce)
    norm = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return gram / (norm[:, :, None] * norm[:, None, :])
