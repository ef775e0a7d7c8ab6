"""What codes of 8, 4 and 2 bits stand for, and the codes nearest to numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.kernels.kv_codec.spec import BITS

E4M3 = torch.float8_e4m3fn
TOP = {"int8": 127.0, "int4": 7.0, "int2": 1.5, "fp8": 448.0, "fp4": 6.0}
"""Largest number that a symmetric code stands for."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a number of 4 bits: the low three bits count them, the fourth is the sign."""
MID_RISE = (-1.5, -0.5, 0.5, 1.5)
FLOOR = 1e-8
"""Least absmax of a group ("release", "rcm")."""


@dataclass(frozen=True)
class CodeFormat:
    """How groups become codes: the type of the numbers, the elements of a group (0: all), along
    which axis, with a zero or not, the mode (`spec.KVCodecSpec`), and whether scales are searched
    (`fitting`) instead of following from the extremes.
    """

    dtype: str
    group_size: int
    granularity: str
    asymmetric: bool
    mode: str
    fit: bool = False

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // BITS[self.dtype]

    @property
    def high_first(self) -> bool:
        """Whether the first code of a byte lies in its high bits."""
        return self.mode == "official"

    @property
    def offset(self) -> float:
        """What is subtracted from an unsigned code to get the number it stands for."""
        if self.asymmetric or self.dtype in ("fp8", "fp4"):
            return 0.0
        if self.mode == "official":
            return {"int8": 0.0, "int4": 7.0, "int2": 1.0}[self.dtype]
        return {"int8": 0.0, "int4": 8.0, "int2": 1.5}[self.dtype]


def numbers(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: CodeFormat) -> Tensor:
    """Codes of `x` [R, groups, g, C]: e4m3 for fp8, int8 for symmetric int8, else uint8."""
    scale = scale.unsqueeze(2)
    y = (x if zero is None else x - zero.unsqueeze(2)) / scale
    # a scale that rounded to zero divides by it: infinities become the last code, 0 / 0 is taken as
    # 0
    if fmt.mode == "official":
        y = torch.where(y.isnan(), 0.0, y)
    top = 2 ** BITS[fmt.dtype] - 1
    if fmt.dtype == "fp8":
        return y.clamp(-TOP["fp8"], TOP["fp8"]).to(E4M3)
    if fmt.dtype == "fp4":
        magnitude = nearest(y.abs(), E2M1)
        return magnitude + 8 * ((y < 0) & (magnitude > 0)).to(torch.uint8)
    if fmt.asymmetric:
        return _rounded(y, fmt).clamp(0, top).to(torch.uint8)
    if fmt.mode == "official":
        bound = top // 2
        signed = _rounded(y, fmt).clamp(-bound, bound)
        return signed.to(torch.int8) if fmt.dtype == "int8" else (signed + bound).to(torch.uint8)
    if fmt.dtype == "int2":
        return nearest(y, MID_RISE)
    half = (top + 1) // 2
    signed = _rounded(y, fmt).clamp(-half, half - 1)
    return signed.to(torch.int8) if fmt.dtype == "int8" else (signed + half).to(torch.uint8)


def nearest(y: Tensor, table: tuple[float, ...]) -> Tensor:
    """Index (uint8) of the entry nearest to each element by float32 distance; the first of
    equals.
    """
    index = torch.zeros(y.shape, dtype=torch.uint8, device=y.device)
    best = (y - table[0]).abs()
    for i, entry in enumerate(table[1:], 1):
        distance = (y - entry).abs()
        closer = distance < best
        index, best = (
            torch.where(closer, i, index).to(torch.uint8),
            torch.where(closer, distance, best),
        )
    return index


def stands_for(unsigned: Tensor, fmt: CodeFormat) -> Tensor:
    """The numbers (float32) of codes of 4 or 2 bits."""
    if fmt.dtype == "fp4":
        magnitudes = torch.tensor(E2M1, device=unsigned.device)
        return magnitudes[(unsigned & 7).long()] * (1.0 - 2.0 * (unsigned >> 3).float())
    return unsigned.float() - fmt.offset


def _rounded(y: Tensor, fmt: CodeFormat) -> Tensor:
    """To whole numbers; halves to even, or away from zero in mode "official"."""
    if fmt.mode != "official":
        return y.round()
    whole = y.trunc()
    return whole + torch.where((y - whole).abs() >= 0.5, y.sign(), 0.0)
