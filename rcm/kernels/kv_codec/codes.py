"""Codes of one tensor: groups with a scale, numbers of 8, 4 or 2 bits, packed into bytes.

A tensor [B, S, N, D] is seen as rows [R, L, C]: groups run along L, and C is what lies innermost in
memory (all channels of all heads where groups run over tokens, else 1). So only groups that run
over the tokens and channels of a head transpose the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.kernels.kv_codec.fitting import fitted
from rcm.kernels.kv_codec.formats import E4M3, FLOOR, TOP, CodeFormat, numbers, stands_for
from rcm.kernels.kv_codec.spec import BITS

OFFICIAL_FLOOR = 1e-10
"""Least scale of a group before it is rounded ("official")."""
E4M3_MAX, E4M3_STEP = 448.0, 2.0**-9
Shape = tuple[int, int, int, int]
"""[B, S, N, D]."""


@dataclass(frozen=True)
class Codes:
    """A coded tensor of `shape` [B, S, N, D].

    data    uint8 (e4m3 for fp8, int8 for symmetric int8), [R, ceil(L / codes in a byte), C].
    scales  [R, groups, C]; zeros: the same, or None.
    unit    float32 [B]: powers of two that e4m3 scales of mode "rcm" count in, or None.
    """

    format: CodeFormat
    shape: Shape
    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    unit: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(
            x.nbytes for x in (self.data, self.scales, self.zeros, self.unit) if x is not None
        )


def shape_of(x: Tensor | Codes) -> Shape:
    """Its four sizes."""
    b, s, n, d = x.shape
    return b, s, n, d


def rows(x: Tensor, granularity: str) -> Tensor:
    """[B, S, N, D] as [R, L, C]."""
    ordered = x.transpose(1, 2) if granularity == "head" else x
    return ordered.reshape(rows_shape(shape_of(x), granularity))


def unrows(r: Tensor, shape: Shape, granularity: str) -> Tensor:
    """The inverse of `rows`."""
    b, s, n, d = shape
    return r.reshape(b, n, s, d).transpose(1, 2) if granularity == "head" else r.reshape(shape)


def group_length(length: int, group_size: int) -> int:
    """Elements of a group on an axis of `length`."""
    return length if group_size <= 0 or group_size >= length else group_size


def encode(x: Tensor, fmt: CodeFormat) -> Codes:
    """Codes of `x` [B, S, N, D], computed in float32."""
    shape = shape_of(x)
    grouped, length = _grouped(rows(x, fmt.granularity).float(), fmt)
    low, high = grouped.amin(2), grouped.amax(2)
    if fmt.fit:
        scales, zeros, unit = stored(*fitted(grouped, length, fmt), fmt, batch=shape[0])
    else:
        scales, zeros, unit = scales_of(low, high, fmt, batch=shape[0])
    unsigned = numbers(grouped, *divisors(low, high, scales, zeros, unit, fmt), fmt)
    flat = unsigned.flatten(1, 2)[:, :length]
    return Codes(fmt, shape, pack(flat, fmt), scales, zeros, unit)


def decode(codes: Codes) -> Tensor:
    """float32 [B, S, N, D]."""
    fmt, (r, groups, c) = codes.format, codes.scales.shape
    length = rows_shape(codes.shape, fmt.granularity)[1]
    g = group_length(length, fmt.group_size)
    values = F.pad(unpack(codes.data, fmt, length), (0, 0, 0, groups * g - length)).view(
        r, groups, g, c
    )
    values = values * effective(codes.scales, codes.unit).unsqueeze(2)
    if codes.zeros is not None:
        values = values + codes.zeros.float().unsqueeze(2)
    return unrows(values.flatten(1, 2)[:, :length], codes.shape, fmt.granularity)


def rows_shape(shape: Shape, granularity: str) -> tuple[int, int, int]:
    """(R, L, C) of `rows`."""
    b, s, n, d = shape
    return {
        "token": (b * s * n, d, 1),
        "channel": (b, s, n * d),
        "head": (b * n, s * d, 1),
        "tensor": (b, s * n * d, 1),
    }[granularity]


def scales_of(
    low: Tensor, high: Tensor, fmt: CodeFormat, *, batch: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Stored scales, zeros and units of groups with extremes `low`, `high` float32 [R, groups,
    C].
    """
    return stored(exact_scales(low, high, fmt), low, fmt, batch=batch)


def stored(
    exact: Tensor, zeros: Tensor, fmt: CodeFormat, *, batch: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales and zeros (looked at where groups have them) rounded to what is stored, and units."""
    if fmt.asymmetric:
        kind = E4M3 if fmt.mode == "official" else torch.float16
        zeros = zeros.clamp(-E4M3_MAX, E4M3_MAX) if kind == E4M3 else zeros
        exact = exact.clamp(max=E4M3_MAX) if kind == E4M3 else exact
        return _at_least_a_step(exact.to(kind), fmt), zeros.to(kind), None
    if fmt.mode != "rcm":
        return exact.clamp(max=E4M3_MAX).to(E4M3), None, None
    if BITS[fmt.dtype] == 8:
        return _at_least_a_step(exact.to(torch.float16), fmt), None, None
    largest = exact.reshape(batch, -1).amax(1)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / E4M3_MAX).exponent)
    per_row = _per_row(unit, exact.shape[0])
    return (exact / per_row).clamp(min=E4M3_STEP, max=E4M3_MAX).to(E4M3), None, unit


def exact_scales(low: Tensor, high: Tensor, fmt: CodeFormat) -> Tensor:
    """Scales before they are rounded for storage."""
    if fmt.asymmetric:
        floor = OFFICIAL_FLOOR if fmt.mode == "official" else FLOOR
        return ((high - low) / (2 ** BITS[fmt.dtype] - 1)).clamp(min=floor)
    absmax = torch.maximum(high, -low)
    if fmt.mode == "official":
        return (absmax / (2 ** (BITS[fmt.dtype] - 1) - 1)).clamp(min=OFFICIAL_FLOOR)
    absmax = absmax.clamp(min=FLOOR)
    if fmt.mode == "rcm" and BITS[fmt.dtype] == 8:
        # on CUDA torch multiplies with the inverse of a number; kernels divide
        return absmax / absmax.new_full((), TOP[fmt.dtype])
    return absmax / TOP[fmt.dtype]


def divisors(
    low: Tensor,
    high: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    unit: Tensor | None,
    fmt: CodeFormat,
) -> tuple[Tensor, Tensor | None]:
    """What codes are computed with, float32 [R, groups, C]: the scale and the zero. "release"
    divides by the scale before rounding it.
    """
    scale = exact_scales(low, high, fmt) if fmt.mode == "release" else effective(scales, unit)
    return scale, None if zeros is None else zeros.float()


def effective(scales: Tensor, unit: Tensor | None) -> Tensor:
    """Stored scales as float32."""
    return scales.float() if unit is None else scales.float() * _per_row(unit, scales.shape[0])


def pack(numbers: Tensor, fmt: CodeFormat) -> Tensor:
    """[R, L, C] codes as bytes [R, ceil(L / codes in a byte), C]; the last byte is filled up with
    zeros.
    """
    if fmt.per_byte == 1:
        return numbers.contiguous()
    r, length, c = numbers.shape
    filled = F.pad(numbers, (0, 0, 0, -length % fmt.per_byte)).view(r, -1, fmt.per_byte, c)
    byte = torch.zeros_like(filled[:, :, 0])
    for place in range(fmt.per_byte):
        byte |= filled[:, :, place] << shift(place, fmt)
    return byte


def unpack(data: Tensor, fmt: CodeFormat, length: int) -> Tensor:
    """The numbers (float32 [R, L, C]) that bytes stand for, before scale and zero."""
    if fmt.per_byte == 1:
        return data.float()
    mask = 2 ** BITS[fmt.dtype] - 1
    parts = torch.stack(
        [(data >> shift(place, fmt)) & mask for place in range(fmt.per_byte)], dim=2
    )
    return stands_for(parts.flatten(1, 2)[:, :length], fmt)


def shift(place: int, fmt: CodeFormat) -> int:
    """Bits by which the code number `place` of a byte is shifted."""
    return BITS[fmt.dtype] * (fmt.per_byte - 1 - place if fmt.high_first else place)


def check_official(shape: tuple[int, ...], fmt: CodeFormat, *, flag: str) -> CodeFormat:
    """`fmt` with its group fixed for heads of D channels; `ConfigError` where the group does not
    divide them, as the package demands.
    """
    g = group_length(shape[3], fmt.group_size)
    if shape[3] % g:
        raise ConfigError(
            f"--{flag}={g} must divide the {shape[3]} channels of a head with --kv_mode official"
        )
    return replace(fmt, group_size=g)


def _grouped(x: Tensor, fmt: CodeFormat) -> tuple[Tensor, int]:
    """[R, L, C] as [R, groups, g, C], filled up with zeros, and L."""
    r, length, c = x.shape
    g = group_length(length, fmt.group_size)
    missing = -length % g
    if missing and fmt.asymmetric:  # zeros would widen the range of the last group
        return torch.cat([x, x[:, -1:].expand(-1, missing, -1)], dim=1).view(r, -1, g, c), length
    return F.pad(x, (0, 0, 0, missing)).view(r, -1, g, c), length


def _at_least_a_step(scales: Tensor, fmt: CodeFormat) -> Tensor:
    """fp16 scales kept above zero, so that codes can be computed with them."""
    return scales if fmt.mode == "official" else scales.clamp(min=2.0**-24)


def _per_row(unit: Tensor, count: int) -> Tensor:
    """[B] spread over the rows of each sample, [R, 1, 1]."""
    return unit.repeat_interleave(count // unit.shape[0]).view(-1, 1, 1)
