"""Rotary position embedding over (frame, row, column): tables from host integers, and the rotation.

A head of D channels is D/2 interleaved pairs (2j, 2j+1). The axes take, in the order frame, row,
column, D - 4 (D // 6), 2 (D // 6) and 2 (D // 6) channels (44 / 42 / 42 for D = 128); pair j of an
axis of d channels turns by position * 10000^(-2j/d). docs/reference/wan.md#positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rcm.core.device_copy import to_device
from rcm.core.errors import ConfigError
from rcm.kernels.fused import reference
from rcm.nets.layers import FusedLayer
from rcm.nets.positions import Positions

THETA = 10000.0
TABLES_KEPT = 32
TABLE_BYTES_KEPT = 1 << 28
"""The tables of one network's recent layouts: a stream without end makes new ones for ever."""


@dataclass(frozen=True)
class RopeTable:
    """Rotation of L tokens: `cos` and `sin` [L, 1, D], or [B or 1, L, N or 1, D] where positions
    differ between samples or heads; float32 (float64 for float64 networks); `sin` of the even
    channels has the sign of the rotation.
    """

    cos: Tensor
    sin: Tensor

    @property
    def num_tokens(self) -> int:
        return self.cos.shape[-3]

    @property
    def num_bytes(self) -> int:
        return self.cos.nbytes + self.sin.nbytes

    @property
    def is_common(self) -> bool:
        """Whether all samples and heads turn alike, which the fused kernel needs."""
        return self.cos.dim() == 3

    @cached_property
    def per_pair(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles themselves, [L, D / 2] contiguous, for the fused kernel."""
        with torch.inference_mode(False), torch.no_grad():  # kept as long as the table
            return self.cos[:, 0, 0::2].contiguous(), self.sin[:, 0, 1::2].contiguous()


@dataclass(frozen=True)
class RopePair:
    """Tables of queries and keys: one object, unless cached keys turn along (pre-RoPE cache)."""

    query: RopeTable
    key: RopeTable


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels per axis: frame, row, column. `ValueError` unless `head_dim` is even and >= 6."""
    if head_dim < 6 or head_dim % 2:
        raise ValueError(
            f"rotary embedding needs an even head size of at least 6, got {head_dim}; choose dim /"
            " num_heads accordingly"
        )
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate the channel pairs of `x` [B, L, N, D] by `table`, in its dtype; same dtype as `x`.

    Linear in `x`, so a tangent turns with it. Raises `ValueError` unless L and D agree with the
    table.
    """
    _check_fit(x, table)
    return reference.rotate_pairs(x, table.cos, table.sin)


def turned_in_time(keys: Tensor, frames: Tensor | float, *, ntk: float = 1.0) -> Tensor:
    """Rotated keys [B, S, N, D] moved by `frames` in time: a number, or [B or 1, S] per token.

    Rows and columns stay. `ntk`: the time axis' ratio of the tables that rotated them. Float32
    arithmetic (float64 for float64 keys).
    """
    channels = axis_channels(keys.shape[-1])[0]
    wide = torch.promote_types(keys.dtype, torch.float32)
    moved = to_device(torch.as_tensor(frames, dtype=torch.float64), keys.device)
    angle = (moved if moved.dim() == 2 else moved.reshape(1, 1))[:, :, None, None] * to_device(
        _rates(channels, ntk), keys.device
    )
    cos, sin = angle.cos(), angle.sin()
    time = reference.rotate_pairs(
        keys[..., :channels].to(wide), _paired(cos, cos).to(wide), _paired(-sin, sin).to(wide)
    )
    return torch.cat([time.to(keys.dtype), keys[..., channels:]], dim=-1)


def _check_fit(x: Tensor, table: RopeTable) -> None:
    if x.shape[1] != table.num_tokens or x.shape[3] != table.cos.shape[-1]:
        raise ValueError(
            f"rotary table covers {table.num_tokens} tokens of head size {table.cos.shape[-1]}, got"
            f" x {tuple(x.shape)} as [B, L, N, D]; the layout must describe the tokens of this call"
        )


class Rotate(FusedLayer):
    """`rotate` as a module: the tangent guard watches it, and it has a fused kernel."""

    def forward(self, x: Tensor, table: RopeTable) -> Tensor:
        if not table.is_common or not self.runs_fused(x):
            return rotate(x, table)
        _check_fit(x, table)
        from rcm.kernels.fused.api import rotate_pairs  # Triton is imported only where it runs

        return rotate_pairs(x, *table.per_pair)


class RopeTables:
    """Builds tables and keeps the latest; they stay out of the network's state dict.

    `max_rows` and `max_columns` bound the positions within a frame. Time is not bounded: angles are
    exact for any integer. `ntk`: how many times slower the slowest pair of each axis (frame, row,
    column) turns than in training (see `stretch`).
    """

    def __init__(self, head_dim: int, *, max_rows: int, max_columns: int) -> None:
        self.channels = axis_channels(head_dim)
        self.limits = {"row": max_rows, "column": max_columns}
        self.ntk = (1.0, 1.0, 1.0)
        self._kept: dict[tuple, RopeTable] = {}

    def stretch(self, ntk: tuple[float, float, float]) -> None:
        """Set `ntk` for later tables. `ConfigError` unless all three are positive and finite."""
        if len(ntk) != 3 or not all(0 < ratio < math.inf for ratio in ntk):
            raise ConfigError(
                f"NTK ratios of frames, rows and columns must be three positive numbers, got {ntk}"
            )
        self.ntk = ntk
        self._kept = {}

    def table(
        self,
        frame_index: tuple[int, ...],
        grid: tuple[int, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> RopeTable:
        """Table for the tokens of the frames at temporal positions `frame_index`, each a `grid`
        (rows, columns), row-major, columns fastest. Raises `ConfigError` for a grid beyond the
        limits.
        """
        key = (frame_index, grid, device, dtype)
        found = self._kept.get(key)
        if found is None:
            self._check(frame_index, grid)
            # a table may outlive the mode it was first asked for in
            with torch.inference_mode(False), torch.no_grad():
                found = self._build(frame_index, grid, device=device, dtype=dtype)
        # a new dict each time: streams of other threads look into the old one
        kept = {old: table for old, table in self._kept.items() if old != key} | {key: found}
        while len(kept) > TABLES_KEPT or (
            len(kept) > 1 and sum(x.num_bytes for x in kept.values()) > TABLE_BYTES_KEPT
        ):
            del kept[next(iter(kept))]
        self._kept = kept
        return found

    def at(self, positions: Positions, *, device: torch.device, dtype: torch.dtype) -> RopeTable:
        """Table for tokens at `positions`; kept for whole frames, else made anew."""
        if positions.frames is not None:
            return self.table(positions.frames, positions.grid, device=device, dtype=dtype)
        where = to_device(positions.per_token.to(torch.float64), device)
        rates = [
            to_device(_rates(channels, ntk), device)
            for channels, ntk in zip(self.channels, self.ntk, strict=True)
        ]
        parts = [where[..., axis, None] * rate for axis, rate in enumerate(rates)]
        return _table(torch.cat(parts, dim=-1), dtype)

    def _check(self, frame_index: tuple[int, ...], grid: tuple[int, int]) -> None:
        if not frame_index:
            raise ValueError("rotary table of no frames; frame_index is empty")
        for count, (axis, limit) in zip(grid, self.limits.items(), strict=True):
            if count > limit:
                raise ConfigError(
                    f"rotary {axis} positions must be in [0, {limit}), got 0 to {count - 1}; "
                    f"choose a smaller resolution or raise WanConfig.max_{axis}s"
                )

    def _build(
        self,
        frame_index: tuple[int, ...],
        grid: tuple[int, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> RopeTable:
        positions = (torch.tensor(frame_index), torch.arange(grid[0]), torch.arange(grid[1]))
        full = (len(frame_index), *grid)
        angles = []
        for axis, (position, channels) in enumerate(zip(positions, self.channels, strict=True)):
            shape = [1, 1, 1]
            shape[axis] = full[axis]
            angle = to_device(position.double()[:, None] * _rates(channels, self.ntk[axis]), device)
            angles.append(angle.reshape(*shape, -1).expand(*full, channels // 2))
        return _table(torch.cat(angles, dim=3).flatten(0, 2)[:, None], dtype)


def _table(angle: Tensor, dtype: torch.dtype) -> RopeTable:
    """Table in `dtype` of angles [..., D / 2]."""
    cos, sin = angle.cos(), angle.sin()
    return RopeTable(_paired(cos, cos).to(dtype), _paired(-sin, sin).to(dtype))


def _rates(channels: int, ntk: float = 1.0) -> Tensor:
    """Turns per position of the pairs of an axis, float64 [channels / 2]. `ntk` stretches the base
    so that the slowest pair turns that many times slower and the fastest as before.
    """
    base = THETA * ntk ** (channels / (channels - 2)) if channels > 2 else THETA
    return base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def _paired(even: Tensor, odd: Tensor) -> Tensor:
    """[..., P] and [..., P] interleaved to [..., 2 P]."""
    return torch.stack([even, odd], dim=-1).flatten(-2)
