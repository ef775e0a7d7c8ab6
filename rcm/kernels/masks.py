"""Which query token may attend to which key token: the only mask definitions of the package.

Every mask shows three faces, derived separately and tested equal:

* a predicate over token indices (`allowed`), arithmetic only, for FlexAttention and as the kernel's
  boundary test;
* contiguous key intervals per run of queries (`row_segments`) and per query tile (`kv_intervals`),
  for dense calls and the Triton kernel;
* a boolean matrix (`dense`), for tests and tiny sizes.

Blocks are counted by `BlockPattern` (Causal-rCM section 4.1): frames form blocks, attention inside
a block is bidirectional. A window K keeps the last K blocks, the query's own included; sinks keep
the first blocks visible beyond a window. A frame holds `tokens_per_frame` consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern

Queries = Literal["both", "noisy"]
Interval = tuple[int, int]
Intervals = tuple[Interval, ...]


class Segment(NamedTuple):
    """A maximal run of queries `[q_start, q_stop)` that attend to the same keys: the union of
    `intervals` (sorted, disjoint, half-open).
    """

    q_start: int
    q_stop: int
    intervals: Intervals


class QueryTile(NamedTuple):
    """A tile of queries as a kernel sees it: no key outside `union` is needed, no key inside
    `common` needs the predicate.
    """

    q_start: int
    q_stop: int
    union: Intervals
    common: Intervals

    @property
    def straddles(self) -> bool:
        """Whether the rows of the tile differ in the keys that they see."""
        return self.union != self.common


@runtime_checkable
class MaskSpec(Protocol):
    """What attention code may ask of a mask. Implementations are frozen and hashable, so that plans
    can be cached by mask.
    """

    def __hash__(self) -> int:
        """By value."""

    @property
    def q_len(self) -> int:
        """Number of query tokens."""

    @property
    def kv_len(self) -> int:
        """Number of key tokens."""

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key, so that plain dense attention is exact."""

    def allowed(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Broadcasting predicate over integer token indices, bool."""

    def row_segments(self) -> tuple[Segment, ...]:
        """The queries cut into maximal runs with equal keys, in order."""

    def kv_intervals(self, block_m: int) -> tuple[QueryTile, ...]:
        """The queries cut into tiles of `block_m`, in order."""

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """The mask as bool `[q_len, kv_len]`, True = attends."""


class _IntervalMask:
    """The faces that follow from `row_segments` and `allowed`; mixed into a `MaskSpec`."""

    @property
    def is_full(self: MaskSpec) -> bool:
        """Whether every query sees every key, so that plain dense attention is exact."""
        segments = self.row_segments()
        return len(segments) == 1 and segments[0].intervals == ((0, self.kv_len),)

    def dense(self: MaskSpec, device: torch.device | str = "cpu") -> Tensor:
        """The mask as bool `[q_len, kv_len]` on `device`, True = attends. Quadratic memory: tests
        and tiny sizes only.
        """
        q_idx = torch.arange(self.q_len, device=device)[:, None]
        kv_idx = torch.arange(self.kv_len, device=device)[None, :]
        return self.allowed(q_idx, kv_idx).expand(self.q_len, self.kv_len).clone()

    def kv_intervals(self: MaskSpec, block_m: int) -> tuple[QueryTile, ...]:
        """Cut the queries into tiles of `block_m` (the last may be short).

        Per tile: the union of the keys that its rows see, and the keys that all of its rows see.
        Raises `ValueError` if `block_m < 1`.
        """
        if block_m < 1:
            raise ValueError(f"block_m must be at least 1, got {block_m}")
        return _tiles(self, block_m)


@dataclass(frozen=True)
class Full(_IntervalMask):
    """No mask: each of `q_len` queries sees all `kv_len` keys. Raises `ConfigError` unless both are
    positive.
    """

    q_len: int
    kv_len: int

    def __post_init__(self) -> None:
        _require_positive("Full.q_len", self.q_len)
        _require_positive("Full.kv_len", self.kv_len)

    def allowed(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """True everywhere, with the broadcast shape of the two index tensors."""
        return (q_idx >= 0) & (kv_idx >= 0)

    def row_segments(self) -> tuple[Segment, ...]:
        """One segment with one interval."""
        return (Segment(0, self.q_len, ((0, self.kv_len),)),)


class _BlockMask(_IntervalMask):
    """What masks over the blocks of a `pattern` share: their checks, and how tokens, blocks, window
    and sinks meet.
    """

    pattern: BlockPattern
    num_frames: int
    tokens_per_frame: int
    window: int | None
    sinks: int

    def __post_init__(self) -> None:
        kind = type(self).__name__
        _require_positive(f"{kind}.num_frames", self.num_frames)
        _require_positive(f"{kind}.tokens_per_frame", self.tokens_per_frame)
        if self.window is not None:
            _require_positive(
                f"{kind}.window (blocks, the query's own included; None = unlimited)", self.window
            )
        if self.sinks < 0:
            raise ConfigError(f"{kind}.sinks must be at least 0 blocks, got {self.sinks}")
        self.pattern.num_blocks(self.num_frames)

    def _block_of(self, token: Tensor) -> Tensor:
        """Block index by arithmetic: a frame of the first block gives a non-positive quotient,
        clamped to 0.
        """
        frame = token // self.tokens_per_frame
        return ((frame - self.pattern.first) // self.pattern.chunk + 1).clamp(min=0)

    def _in_reach(self, q_block: Tensor, kv_block: Tensor) -> Tensor:
        """Window and sinks; the caller adds causality."""
        if self.window is None:
            return kv_block >= 0
        return (kv_block > q_block - self.window) | (kv_block < self.sinks)

    def _token_bounds(self) -> list[Interval]:
        return [
            (start * self.tokens_per_frame, stop * self.tokens_per_frame)
            for start, stop in self.pattern.bounds(self.num_frames)
        ]

    def _prefix(self, bounds: list[Interval], block: int, num: int) -> list[Interval]:
        """Those of the first `num` key blocks, which lie in `bounds`, that a query of `block`
        reaches through window and sinks.
        """
        prefix = bounds[:num]
        if self.window is None:
            return prefix
        oldest = max(0, block - self.window + 1)
        return prefix[: self.sinks] + prefix[max(oldest, self.sinks) :]


@dataclass(frozen=True)
class BlockCausal(_BlockMask):
    """A query of block i sees key blocks j <= i (Causal_rCM.md section 2, block_causal).

    With `window=K`: of those only j >= i - (K - 1), and j < `sinks`. Keys are the blocks 0 .. last
    query block and cover `num_frames` frames; queries are the blocks `q_block_offset` .. last, so a
    streaming chunk over its cache is `q_block_offset = num_blocks - 1`. `num_q_blocks` may restate
    the number of query blocks and must then agree. Raises `ConfigError` for a pattern that does not
    fit `num_frames`, an offset outside the blocks, a window below 1 or negative sinks.
    """

    pattern: BlockPattern
    num_frames: int
    tokens_per_frame: int
    q_block_offset: int = 0
    num_q_blocks: int | None = None
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        num_blocks = self.pattern.num_blocks(self.num_frames)
        if not 0 <= self.q_block_offset < num_blocks:
            raise ConfigError(
                f"q_block_offset must be in [0, {num_blocks}), the blocks of {self.num_frames}"
                f" frames in {self.pattern.name}, got {self.q_block_offset}"
            )
        if self.num_q_blocks is not None and self.num_q_blocks != num_blocks - self.q_block_offset:
            raise ConfigError(
                f"num_q_blocks={self.num_q_blocks}, but the last query block must be the last key"
                f" block: {num_blocks} key blocks - q_block_offset {self.q_block_offset} ="
                f" {num_blocks - self.q_block_offset}; set num_frames to the frames of the keys"
            )

    @property
    def kv_len(self) -> int:
        """Number of key tokens."""
        return self.num_frames * self.tokens_per_frame

    @property
    def q_len(self) -> int:
        """Number of query tokens."""
        return self.kv_len - self._q_token_offset

    @property
    def _q_token_offset(self) -> int:
        return self.pattern.bounds(self.num_frames)[self.q_block_offset][0] * self.tokens_per_frame

    def allowed(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Broadcasting predicate; `q_idx` counts from the first query token, `kv_idx` from the
        first key token.
        """
        q_block, kv_block = self._block_of(q_idx + self._q_token_offset), self._block_of(kv_idx)
        return (kv_block <= q_block) & self._in_reach(q_block, kv_block)

    def row_segments(self) -> tuple[Segment, ...]:
        """One segment per query block; neighbours with equal keys are joined."""
        return _block_causal_segments(self)


@dataclass(frozen=True)
class TeacherForcing(_BlockMask):
    """Keys are `[clean L ; noisy L]` tokens with L = num_frames * tokens_per_frame (Causal_rCM.md
    section 2, teacher_forcing).

    A clean query of block i sees clean blocks j <= i and nothing noisy. A noisy query of block i
    sees clean blocks j < i (strictly) and the noisy tokens of its own block. `window=K` restricts
    the clean blocks to j >= i - (K - 1), so K counts the query's own block; `sinks` keeps clean
    blocks j < sinks within those limits. `queries="both"` has 2L queries, `queries="noisy"` only
    the noisy half (the clean half is a cache). Raises `ConfigError` for a pattern that does not
    fit, a window below 1, negative sinks, or another value of `queries`.
    """

    pattern: BlockPattern
    num_frames: int
    tokens_per_frame: int
    queries: Queries = "both"
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries not in ("both", "noisy"):
            raise ConfigError(
                f"TeacherForcing.queries must be 'both' or 'noisy', got {self.queries!r}"
            )

    @property
    def half_len(self) -> int:
        """Number of tokens L in one half."""
        return self.num_frames * self.tokens_per_frame

    @property
    def kv_len(self) -> int:
        """Number of key tokens, 2L."""
        return 2 * self.half_len

    @property
    def q_len(self) -> int:
        """Number of query tokens, 2L or L."""
        return self.kv_len if self.queries == "both" else self.half_len

    def allowed(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Broadcasting predicate; with `queries="noisy"`, `q_idx` counts from the first noisy
        token.
        """
        half = self.half_len
        q_packed = q_idx if self.queries == "both" else q_idx + half
        q_noisy, kv_noisy = q_packed >= half, kv_idx >= half
        q_block, kv_block = self._block_of(q_packed % half), self._block_of(kv_idx % half)
        strictly_before = (kv_block < q_block) & self._in_reach(q_block, kv_block)
        own_half_and_block = (q_noisy == kv_noisy) & (q_block == kv_block)
        return own_half_and_block | (strictly_before & ~kv_noisy)

    def row_segments(self) -> tuple[Segment, ...]:
        """One segment per block of each half that has queries; neighbours with equal keys are
        joined.
        """
        return _teacher_forcing_segments(self)


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")


@lru_cache(maxsize=256)
def _block_causal_segments(mask: BlockCausal) -> tuple[Segment, ...]:
    bounds, offset = mask._token_bounds(), mask._q_token_offset
    runs = [
        Segment(start - offset, stop - offset, _union(mask._prefix(bounds, block, block + 1)))
        for block, (start, stop) in enumerate(bounds)
        if block >= mask.q_block_offset
    ]
    return _join_equal(runs)


@lru_cache(maxsize=256)
def _teacher_forcing_segments(mask: TeacherForcing) -> tuple[Segment, ...]:
    bounds, half = mask._token_bounds(), mask.half_len
    clean = [Segment(*own, _union(mask._prefix(bounds, i, i + 1))) for i, own in enumerate(bounds)]
    shift = half if mask.queries == "both" else 0
    noisy = []
    for i, (start, stop) in enumerate(bounds):
        seen = [*mask._prefix(bounds, i, i), (half + start, half + stop)]
        noisy.append(Segment(start + shift, stop + shift, _union(seen)))
    return _join_equal(clean + noisy if mask.queries == "both" else noisy)


@lru_cache(maxsize=256)
def _tiles(mask: MaskSpec, block_m: int) -> tuple[QueryTile, ...]:
    segments, tiles, first = mask.row_segments(), [], 0
    for start in range(0, mask.q_len, block_m):
        stop = min(start + block_m, mask.q_len)
        while segments[first].q_stop <= start:
            first += 1
        last = first
        union, common = segments[first].intervals, segments[first].intervals
        while segments[last].q_stop < stop:
            last += 1
            union, common = (
                _union([*union, *segments[last].intervals]),
                _intersection(common, segments[last].intervals),
            )
        tiles.append(QueryTile(start, stop, union, common))
    return tuple(tiles)


def _union(intervals: list[Interval]) -> Intervals:
    """Sorted, disjoint, non-touching intervals that cover the same integers."""
    merged: list[Interval] = []
    for start, stop in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _intersection(left: Intervals, right: Intervals) -> Intervals:
    """Integers in both; the inputs are sorted and disjoint."""
    overlaps = [(max(a[0], b[0]), min(a[1], b[1])) for a in left for b in right]
    return _union(overlaps)


def _join_equal(runs: list[Segment]) -> tuple[Segment, ...]:
    """Merge neighbouring runs with equal keys."""
    joined: list[Segment] = []
    for run in runs:
        if joined and joined[-1].intervals == run.intervals:
            joined[-1] = Segment(joined[-1].q_start, run.q_stop, run.intervals)
        else:
            joined.append(run)
    return tuple(joined)
