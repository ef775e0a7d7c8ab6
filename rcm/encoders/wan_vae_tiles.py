"""Spatial tiles with linear blending, for cards on which a whole frame does not fit.

Approximate: a tile sees zeros beyond its border and attends to itself alone; blending hides it.
Tiles are visited in order; one that covers everything gives the untiled result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.core.errors import ConfigError

MIN_TILE = 4
OVERLAP_PART = 4


@dataclass(frozen=True)
class Tile:
    """Rows and columns in latent cells, with blending weights at `scale` points per cell."""

    rows: slice
    columns: slice
    row_weights: Tensor
    column_weights: Tensor

    @property
    def cells(self) -> tuple[int, int]:
        """Size in latent cells."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def add(self, piece: Tensor, total: Tensor, *, scale: int) -> None:
        """Add `piece` [..., h, w] times the weights to its place in `total` [..., H, W]."""
        down, across = (slice(s.start * scale, s.stop * scale) for s in (self.rows, self.columns))
        place = total[..., down, across]
        rows, columns = self.row_weights.to(total), self.column_weights.to(total)
        place += piece.to(total.dtype) * rows[:, None] * columns


def plan_tiles(cells: tuple[int, int], *, tile: int, scale: int) -> list[Tile]:
    """Tiles of at most `tile` x `tile` latent cells that overlap by a quarter, weights adding to 1.

    `scale` points per cell of the result: 8 for pixels, 1 for latents.
    """
    if tile < MIN_TILE:
        raise ConfigError(
            f"tile={tile} latent cells is too small; choose tile >= {MIN_TILE} (1 cell = 8 pixels),"
            " or None for whole frames"
        )
    rows, columns = (_axis(length, tile=tile, scale=scale) for length in cells)
    return [Tile(r, c, weights_r, weights_c) for r, weights_r in rows for c, weights_c in columns]


def _axis(length: int, *, tile: int, scale: int) -> list[tuple[slice, Tensor]]:
    """Spans along one axis, evenly spaced, with weights per point that add to 1."""
    if tile >= length:
        return [(slice(0, length), torch.ones(length * scale, dtype=torch.float64))]
    overlap = tile // OVERLAP_PART
    count = -((overlap - length) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    spans = [slice(start, start + tile) for start in starts]
    weights = torch.zeros(count, length * scale, dtype=torch.float64)
    for i, span in enumerate(spans):
        weight = torch.ones(tile * scale, dtype=torch.float64)
        if i:
            ramp = _ramp((spans[i - 1].stop - span.start) * scale)
            weight[: len(ramp)] *= ramp
        if i + 1 < count:
            ramp = _ramp((span.stop - spans[i + 1].start) * scale)
            weight[-len(ramp) :] *= ramp.flip(0)
        weights[i, span.start * scale : span.stop * scale] = weight
    # where three tiles meet the ramps do not add to 1
    weights /= weights.sum(dim=0)
    return [
        (span, weights[i, span.start * scale : span.stop * scale]) for i, span in enumerate(spans)
    ]


def _ramp(points: int) -> Tensor:
    """Weights that rise linearly from 0 to 1, at the middle of each point."""
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points
