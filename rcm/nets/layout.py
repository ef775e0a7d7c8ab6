"""What the frames of one input are: positions, who sees whom, cached tokens, predicted ones.

A layout replaces modes: the network reads it and has no branch for a training regime. Positions are
frames; tokens follow from the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.masks import BlockCausal, Full, MaskSpec, TeacherForcing

Grid = tuple[int, int]


@dataclass(frozen=True)
class TokenLayout:
    """Description of a packed input of `num_frames` frames, each `grid` = (h, w) tokens.

    frame_index      temporal rotary position of each packed frame.
    mask             over packed tokens; its keys are the cached tokens followed by the packed ones.
    output           packed frames [start, stop) whose velocity is predicted.
    context_tokens   cached tokens that the mask expects before the packed ones.
    chunks           frame counts of the chunks that an append pass commits; empty means one chunk.
    Raises `ConfigError` where these do not fit each other.
    """

    grid: Grid
    frame_index: tuple[int, ...]
    mask: MaskSpec
    output: tuple[int, int]
    context_tokens: int = 0
    chunks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or not self.frame_index:
            raise ConfigError(
                f"a layout needs a positive grid and at least one frame, got grid {self.grid} and"
                f" frames {self.frame_index}"
            )
        if not 0 <= self.output[0] < self.output[1] <= self.num_frames:
            raise ConfigError(
                f"output frames {self.output} must be a non-empty range within the"
                f" {self.num_frames} packed frames"
            )
        if self.chunks and (min(self.chunks) < 1 or sum(self.chunks) != self.num_frames):
            raise ConfigError(
                f"chunks {self.chunks} must be of at least one frame each and add up to the"
                f" {self.num_frames} packed frames"
            )
        queries, keys = self.num_tokens, self.num_tokens + self.context_tokens
        if (self.mask.q_len, self.mask.kv_len) != (queries, keys):
            raise ConfigError(
                f"mask {self.mask} covers {self.mask.q_len} queries x {self.mask.kv_len} keys, the"
                f" layout has {queries} x {keys} tokens ({self.num_frames} frames after"
                f" {self.context_tokens} cached tokens, grid {self.grid})"
            )

    @property
    def tokens_per_frame(self) -> int:
        """Tokens S of one frame, h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def num_frames(self) -> int:
        """Packed frames F."""
        return len(self.frame_index)

    @property
    def num_tokens(self) -> int:
        """Packed tokens L = F * S."""
        return self.num_frames * self.tokens_per_frame

    @property
    def num_output_frames(self) -> int:
        return self.output[1] - self.output[0]

    @classmethod
    def bidirectional(cls, num_frames: int, *, grid: Grid) -> TokenLayout:
        """Every frame attends to every frame; all are predicted."""
        tokens = num_frames * grid[0] * grid[1]
        return cls(grid, tuple(range(num_frames)), Full(tokens, tokens), (0, num_frames))

    @classmethod
    def block_causal(
        cls,
        num_frames: int,
        *,
        grid: Grid,
        pattern: BlockPattern,
        window: int | None = None,
        sinks: int = 0,
    ) -> TokenLayout:
        """Frames see their block, earlier ones (last `window`) and first `sinks`; predict all."""
        mask = BlockCausal(pattern, num_frames, grid[0] * grid[1], window=window, sinks=sinks)
        chunks = tuple(stop - start for start, stop in pattern.bounds(num_frames))
        return cls(grid, tuple(range(num_frames)), mask, (0, num_frames), chunks=chunks)

    context = block_causal
    """Clean frames entering an empty cache in one append pass, a chunk per block: the same layout
    under the name of its use.
    """

    @classmethod
    def teacher_forcing(
        cls,
        num_frames: int,
        *,
        grid: Grid,
        pattern: BlockPattern,
        window: int | None = None,
        sinks: int = 0,
    ) -> TokenLayout:
        """Packed [clean T | noisy T] frames at the same positions; the noisy half is predicted."""
        mask = TeacherForcing(
            pattern, num_frames, grid[0] * grid[1], queries="both", window=window, sinks=sinks
        )
        positions = tuple(range(num_frames))
        return cls(grid, positions + positions, mask, (num_frames, 2 * num_frames))

    @classmethod
    def cached_chunk(
        cls,
        block: int,
        *,
        grid: Grid,
        pattern: BlockPattern,
        num_frames: int,
        window: int | None = None,
        sinks: int = 0,
    ) -> TokenLayout:
        """The frames of block `block` of a `num_frames` video, after all earlier blocks in the
        cache. Raises `ConfigError` for a block outside.
        """
        bounds = pattern.bounds(num_frames)
        if not 0 <= block < len(bounds):
            raise ConfigError(
                f"block must be in [0, {len(bounds)}) for {num_frames} frames in {pattern.name},"
                f" got {block}"
            )
        start, stop = bounds[block]
        mask = BlockCausal(
            pattern,
            stop,
            grid[0] * grid[1],
            q_block_offset=block,
            num_q_blocks=1,
            window=window,
            sinks=sinks,
        )
        return cls(
            grid,
            tuple(range(start, stop)),
            mask,
            (0, stop - start),
            context_tokens=start * grid[0] * grid[1],
        )

    @classmethod
    def over_cache(
        cls, frame_index: Sequence[int], *, grid: Grid, context_tokens: int
    ) -> TokenLayout:
        """One chunk at positions `frame_index` that sees `context_tokens`, all a cache shows."""
        own = len(frame_index) * grid[0] * grid[1]
        return cls(
            grid,
            tuple(frame_index),
            Full(own, context_tokens + own),
            (0, len(frame_index)),
            context_tokens=context_tokens,
        )

    @classmethod
    def noisy_over_context(
        cls,
        num_frames: int,
        *,
        grid: Grid,
        pattern: BlockPattern,
        window: int | None = None,
        sinks: int = 0,
    ) -> TokenLayout:
        """The noisy half of `teacher_forcing` over the clean half, cached by `context`.

        The clean half sees nothing noisy and its times are constant, so in a tangent pass it has no
        tangent: run it once as plain tensors.
        """
        mask = TeacherForcing(
            pattern, num_frames, grid[0] * grid[1], queries="noisy", window=window, sinks=sinks
        )
        return cls(
            grid,
            tuple(range(num_frames)),
            mask,
            (0, num_frames),
            context_tokens=num_frames * grid[0] * grid[1],
        )
