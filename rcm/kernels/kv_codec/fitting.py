"""Scales that fit their group: of a few steps, that whose codes explain most of the group, and for
these codes the scale (and zero) of least squares.

A scale from the largest element lets no code overflow, but most elements then lie between few wide
levels, and what is restored is larger than what was coded: keys draw more attention, by far the
most of the error of 2 bits. An element weighs as much as it is large, and half the largest besides:
the softmax follows large logits, and a group with a few large channels would lose them otherwise.

Elements are whole numbers on a grid of 2^GRID steps up to the largest, so sums do not depend on
their order, and the kernel (`kernels.fit`) finds the same scale bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.kernels.kv_codec.formats import FLOOR, TOP, CodeFormat, numbers, stands_for
from rcm.kernels.kv_codec.spec import BITS

GRID = 9
"""Bits of an element on the grid, its sign apart."""
CANDIDATES = 4
"""Steps that are tried: 1, 0.85, 0.7, 0.55 of the one that lets nothing overflow."""


def step_of(fmt: CodeFormat) -> float:
    """The step that lets nothing overflow, for groups that reach from -1 to 1."""
    return 2.0 / (2 ** BITS[fmt.dtype] - 1) if fmt.asymmetric else 1.0 / TOP[fmt.dtype]


def middle_of(fmt: CodeFormat) -> float:
    """The code, not rounded, of the middle of a group."""
    return (2 ** BITS[fmt.dtype] - 1) / 2 if fmt.asymmetric else 0.0


def floor_of(fmt: CodeFormat) -> float:
    """Least scale."""
    return FLOOR * step_of(fmt)


def fitted(x: Tensor, length: int, fmt: CodeFormat) -> tuple[Tensor, Tensor]:
    """Scales and zeros (0 for symmetric groups), float32 [R, groups, C], not yet rounded for
    storage, of groups `x` float32 [R, groups, g, C]; elements of a row from `length` on are
    padding.
    """
    there = torch.arange(x.shape[1] * x.shape[2], device=x.device) < length
    low, high = x.amin(2), x.amax(2)
    mid = (low + high) * 0.5 if fmt.asymmetric else torch.zeros_like(low)
    half = (high - mid if fmt.asymmetric else torch.maximum(high, -low)).clamp(min=FLOOR)
    exponent = half.frexp().exponent
    per, back = (_power_of_2(GRID - exponent), _power_of_2(exponent - GRID))
    y = ((x - mid.unsqueeze(2)) * per.unsqueeze(2)).round()
    reach = half * per
    weight = 2 * y.abs() + reach.round().unsqueeze(2)
    weight = torch.where(there.view(1, x.shape[1], x.shape[2], 1), weight, 0.0).long()
    best = [torch.full_like(low, value) for value in (-1.0, 0.0, 0.0)]
    for i in range(CANDIDATES):
        inverse = (reach * ((1.0 - 0.15 * i) * step_of(fmt))).reciprocal()
        scaled = y * inverse.unsqueeze(2) + middle_of(fmt)
        unsigned = numbers(scaled, torch.ones_like(reach), None, fmt)
        twice = (2 * stands_for(unsigned, fmt)).long()
        found = _least_squares(y.long(), twice, weight, fmt)
        better = found[0] > best[0]
        best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
    _, scale, zero = best
    scale = (2 * scale * back).clamp(min=floor_of(fmt))
    return scale + (low - low) + (high - high), mid + zero * back  # NaN and infinities make it NaN


def _least_squares(
    y: Tensor, twice: Tensor, weight: Tensor, fmt: CodeFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """(score, scale, zero), float32 [R, groups, C]: the weighted regression of `y` on codes
    `twice`, and what it explains of the squares of `y`, up to what all codes have in common.
    """
    product = (weight * y * twice).sum(2).float()
    square = (weight * twice * twice).sum(2).float()
    if not fmt.asymmetric:
        scale = product / square.clamp(min=1.0)
        return product * scale, scale, torch.zeros_like(scale)
    total, first, codes = (x.sum(2).float() for x in (weight, weight * y, weight * twice))
    spread = (total * square - codes * codes).clamp(min=1.0)
    common = total * product - codes * first
    scale = common / spread
    return common * scale, scale, (square * first - codes * product) / spread


def _power_of_2(exponent: Tensor) -> Tensor:
    """2^exponent in float32, exact on every device."""
    return ((exponent + 127) << 23).view(torch.float32)
