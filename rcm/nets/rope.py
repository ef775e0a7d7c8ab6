"""Rotary position embedding over (frame, row, column): tables from host integers, and the rotation.

A head of D channels is D/2 interleaved pairs (2j, 2j+1). The axes take, in the order frame, row, column, D - 4 (D // 6), 2 (D // 6)
and 2 (D // 6) channels (44 / 42 / 42 for D = 128); pair j of an axis of d channels turns by position * 10000^(-2j/d). spec/wan.md 1.4.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rcm.kernels.fused import reference
from rcm.nets.layers import FusedLayer

THETA = 10000.0
TABLES_KEPT = 32


@dataclass(frozen=True)
class RopeTable:
    """Rotation of L tokens: `cos` and `sin` [L, 1, D], float32 (float64 for float64 networks); `sin` of the even channels has the sign
    of the rotation.
    """

    cos: Tensor
    sin: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens L."""
        return self.cos.shape[0]

    @cached_property
    def per_pair(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles themselves, [L, D / 2] contiguous, for the fused kernel."""
        with torch.inference_mode(False), torch.no_grad():  # kept as long as the table
            return self.cos[:, 0, 0::2].contiguous(), self.sin[:, 0, 1::2].contiguous()


@dataclass(frozen=True)
class RopePair:
    """Tables of the queries and of the keys; one object twice unless cached keys are rotated along (pre-RoPE cache)."""

    query: RopeTable
    key: RopeTable


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels of the frame, row and column axes. Raises `ValueError` unless `head_dim` is even and at least 6."""
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head size of at least 6, got {head_dim}; choose dim / num_heads accordingly")
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate the channel pairs of `x` [B, L, N, D] by the angles of `table`; computed in the table's dtype, returned in the dtype of `x`.

    Linear in `x`, so a tangent turns with it. Raises `ValueError` unless L and D agree with the table.
    """
    _check_fit(x, table)
    return reference.rotate_pairs(x, table.cos, table.sin)


def _check_fit(x: Tensor, table: RopeTable) -> None:
    if x.shape[1] != table.num_tokens or x.shape[3] != table.cos.shape[2]:
        raise ValueError(
            f"rotary table covers {table.num_tokens} tokens of head size {table.cos.shape[2]}, "
            f"got x {tuple(x.shape)} as [B, L, N, D]; the layout must describe the tokens of this call"
        )


class Rotate(FusedLayer):
    """`rotate` as a module: the tangent guard watches it, and it has a fused kernel."""

    def forward(self, x: Tensor, table: RopeTable) -> Tensor:
        """`x` [B, L, N, D] rotated by `table`."""
        if not self.runs_fused(x):
            return rotate(x, table)
        _check_fit(x, table)
        from rcm.kernels.fused.api import rotate_pairs  # Triton is imported only where it runs

        return rotate_pairs(x, *table.per_pair)


class RopeTables:
    """Builds tables and keeps the most recently used ones; they are no state of the network and stay out of its state dict.

    `max_positions` (frames, rows, columns) are the limits of the positions, above which the network was never trained.
    """

    def __init__(self, head_dim: int, *, max_positions: tuple[int, int, int]) -> None:
        self.channels = axis_channels(head_dim)
        self.max_positions = max_positions
        self._kept: OrderedDict[tuple, RopeTable] = OrderedDict()

    def table(self, frame_index: tuple[int, ...], grid: tuple[int, int], *, device: torch.device, dtype: torch.dtype) -> RopeTable:
        """Table for the tokens of the frames at temporal positions `frame_index`, each a `grid` (rows, columns), row-major, columns
        fastest.

        Raises `ValueError` for a position below 0 or beyond the limits.
        """
        key = (frame_index, grid, device, dtype)
        found = self._kept.pop(key, None)
        if found is None:
            self._check(frame_index, grid)
            with torch.inference_mode(False), torch.no_grad():  # a table may outlive the mode it was first asked for in
                found = self._build(frame_index, grid, device=device, dtype=dtype)
        self._kept[key] = found
        if len(self._kept) > TABLES_KEPT:
            self._kept.popitem(last=False)
        return found

    def _check(self, frame_index: tuple[int, ...], grid: tuple[int, int]) -> None:
        if not frame_index:
            raise ValueError("rotary table of no frames; frame_index is empty")
        spans = ((min(frame_index), max(frame_index)), (0, grid[0] - 1), (0, grid[1] - 1))
        for axis, (low, high), limit in zip(("frame", "row", "column"), spans, self.max_positions, strict=True):
            if low < 0 or high >= limit:
                raise ValueError(
                    f"rotary {axis} positions must be in [0, {limit}), got {low} to {high}; "
                    f"shorten the video or raise WanConfig.max_{axis}s"
                )

    def _build(self, frame_index: tuple[int, ...], grid: tuple[int, int], *, device: torch.device, dtype: torch.dtype) -> RopeTable:
        positions = (torch.tensor(frame_index), torch.arange(grid[0]), torch.arange(grid[1]))
        full = (len(frame_index), *grid)
        angles = []
        for axis, (position, channels) in enumerate(zip(positions, self.channels, strict=True)):
            rates = THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
            shape = [1, 1, 1, channels // 2]
            shape[axis] = full[axis]
            angles.append((position.double()[:, None] * rates).reshape(shape).expand(*full, channels // 2))
        angle = torch.cat(angles, dim=3).flatten(0, 2).to(device)
        cos, sin = angle.cos(), angle.sin()
        cos = torch.stack([cos, cos], dim=2).flatten(1)[:, None]
        sin = torch.stack([-sin, sin], dim=2).flatten(1)[:, None]
        return RopeTable(cos.to(dtype), sin.to(dtype))
