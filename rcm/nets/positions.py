"""Where tokens stand: (frame, row, column), common to batch and heads or per sample and head.

The common case, whole frames of one grid, is a tuple of integers, so that tables can be kept by it;
everything else is a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions of tokens.

    frames    temporal position of each whole frame of `grid` = (rows, columns) tokens, row-major;
              None where `tokens` says it all.
    tokens    int64 or float64 [B or 1, L, N or 1, 3]: frame, row, column per token, sample and
              head; on the host or a device.
    """

    grid: tuple[int, int]
    frames: tuple[int, ...] | None = None
    tokens: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        if self.frames is None:
            return self.per_token.shape[1]
        return len(self.frames) * self.grid[0] * self.grid[1]

    @cached_property
    def per_token(self) -> Tensor:
        """The positions as [B or 1, L, N or 1, 3]."""
        if self.frames is None:
            assert self.tokens is not None, "positions are frames or tokens"
            return self.tokens
        time, row, column = torch.meshgrid(
            torch.tensor(self.frames), *(torch.arange(n) for n in self.grid), indexing="ij"
        )
        return torch.stack([time, row, column], dim=-1).reshape(1, -1, 1, 3)

    def moved_to(self, frames: tuple[int, ...]) -> Positions:
        """The same tokens with other temporal positions, one per frame. `ValueError` for another
        number, or where there are no frames.
        """
        if self.frames is None or len(frames) != len(self.frames):
            mine = (
                "tokens of no whole frames; give a Positions"
                if self.frames is None
                else f"{len(self.frames)} frames"
            )
            raise ValueError(f"{len(frames)} temporal positions for {mine}")
        return replace(self, frames=frames)


def at_frames(frames: Sequence[int], grid: tuple[int, int]) -> Positions:
    """Whole frames of `grid` tokens at temporal positions `frames`."""
    return Positions(grid, frames=tuple(frames))


def concatenated(parts: Sequence[Positions]) -> Positions:
    """`parts` one after the other."""
    if len(parts) == 1:
        return parts[0]
    grid = parts[0].grid
    frames = [part.frames for part in parts if part.frames is not None and part.grid == grid]
    if len(frames) == len(parts):
        return Positions(grid, frames=tuple(t for times in frames for t in times))
    tensors = [part.per_token for part in parts]
    batch, heads = (max(x.shape[dim] for x in tensors) for dim in (0, 2))
    device = next((x.device for x in tensors if x.device.type != "cpu"), tensors[0].device)
    dtype = torch.float64 if any(x.is_floating_point() for x in tensors) else torch.int64
    tensors = [x.to(device, dtype).expand(batch, -1, heads, -1) for x in tensors]
    return Positions(grid, tokens=torch.cat(tensors, dim=1))


def cut(whole: Positions, start: int, count: int) -> Positions:
    """Tokens [start, start + count)."""
    if (start, count) == (0, whole.num_tokens):
        return whole
    per_frame = whole.grid[0] * whole.grid[1]
    if whole.frames is not None and start % per_frame == 0 and count % per_frame == 0:
        return replace(
            whole, frames=whole.frames[start // per_frame : (start + count) // per_frame]
        )
    return Positions(whole.grid, tokens=whole.per_token[:, start : start + count])
