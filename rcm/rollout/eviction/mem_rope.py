"""MemRoPE (arXiv 2603.12513): old frames enter two running means, seen as two frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_rewrite import region, rewrite, split
from rcm.nets.kv_store import Pair
from rcm.nets.positions import at_frames
from rcm.rollout.eviction.base import CachePolicy, ChunkSpan, Placement
from rcm.rollout.eviction.frames import cached_frames, frame_tokens, place_in_a_row, within_frames

MEMORY_FRAMES = 2


@dataclass
class MemRope(CachePolicy):
    """[sinks | long memory | short memory | local | new chunk], positions in a row from 0.

    A memory is a running mean of the keys and values (before rotation) of the frames that leave the
    local ones, one vector per head and layer repeated over its frame: m <- (1 - alpha) m + alpha
    (mean over all tokens of those frames), beginning with the first such mean. `per_position`
    averages over frames only, as the paper does, so that a memory is a whole frame. The release
    averages its own memory frames into every later mean; here only frames that were generated
    enter. Raises `ConfigError` unless sinks >= 0, local >= 1 and both rates lie in (0, 1].
    """

    sinks: int = 3
    local: int = 4
    alpha_long: float = 0.01
    alpha_short: float = 0.1
    per_position: bool = False

    keys = "pre_rope"
    any_keys = absolute = False

    def __post_init__(self) -> None:
        check_kinds(self, prefix="mr_")
        if self.sinks < 0 or self.local < 1:
            raise ConfigError(
                f"mr_sink_frames={self.sinks} must be at least 0 and mr_local_frames={self.local}"
                " at least 1"
            )
        for name in ("alpha_long", "alpha_short"):
            if not 0 < (alpha := getattr(self, name)) <= 1:
                raise ConfigError(f"mr_{name}={alpha:g} must lie above 0 and not above 1")
        self._memory: dict[tuple[int, int], tuple[Pair, Pair]] = {}

    @property
    def budget(self) -> int:
        """Frames that the cache keeps."""
        return self.sinks + MEMORY_FRAMES + self.local

    def capacity_frames(self, pattern: BlockPattern) -> int | None:
        return self.budget + max(pattern.first, pattern.chunk)

    def before(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> Placement:
        held = branches[0].chunks
        first = place_in_a_row(branches, held, first=0)
        return Placement(
            tuple(entry.id for entry in held), tuple(range(first, first + chunk.stop - chunk.start))
        )

    def after(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> None:
        frames = cached_frames(branches[0])
        if frames <= self.budget:
            return
        per_frame, grid = frame_tokens(branches[0]), branches[0].chunks[0].positions.grid
        start, stop = self.sinks * per_frame, (frames - self.local) * per_frame
        parts = [at_frames((self.sinks + i,), grid) for i in range(MEMORY_FRAMES)]
        for number, cache in enumerate(branches):
            split(cache, before=(start, stop))
            rewrite(
                cache, region(cache, start, stop), parts, partial(self._remember, number, per_frame)
            )

    def _remember(
        self, branch: int, per_frame: int, layer: int, keys: Tensor, values: Tensor
    ) -> Pair:
        """The two memory frames of a layer, after the tokens that grow old entered them."""
        known = self._memory.get((branch, layer))
        aged = [x[:, 0 if known is None else MEMORY_FRAMES * per_frame :] for x in (keys, values)]
        means = [self._mean(x, per_frame) for x in aged]

        def updated(i: int, alpha: float) -> Pair:
            if known is None:
                return means[0], means[1]
            key, value = ((1 - alpha) * m + alpha * x for m, x in zip(known[i], means, strict=True))
            return key, value

        memory = updated(0, self.alpha_long), updated(1, self.alpha_short)
        self._memory[branch, layer] = memory
        frames = [[x.expand(-1, per_frame, -1, -1).to(keys.dtype) for x in pair] for pair in memory]
        keys, values = (torch.cat(both, dim=1) for both in zip(*frames, strict=True))
        return keys, values

    def _mean(self, x: Tensor, per_frame: int) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.per_position:
            return wide.unflatten(1, (-1, per_frame)).mean(1)
        return wide.mean(1, keepdim=True)

    def protected(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        return within_frames(branches[0], self.sinks)

    def state(self) -> Any:
        """See `CachePolicy`; memories are replaced, never written."""
        return dict(self._memory)

    def load_state(self, state: Any) -> None:
        self._memory = dict(state)
