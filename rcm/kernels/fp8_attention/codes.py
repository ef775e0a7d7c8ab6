"""The format: e4m3 codes of keys, values and queries (Micikevicius et al. 2022, arXiv:2209.05433),
and how they are made, in torch.

e4m3 keeps 3 bits over 15 binades, so the grain of the scales hardly matters; what does is a common
part of all keys, which softmax does not see: it is taken off (SageAttention2, arXiv:2411.10958).
Per head, from the first keys and values that are coded, and fixed from then on: k = key_center +
key_scale codes, v = value_center + value_scale codes. HEADROOM is left for later ones; what lies
beyond is cut off at 448. Any fixed centers are exact: they move scores by a constant per query, and
the result by `value_center`.

Both products of attention want the summed axis of their right operand innermost, so values are held
transposed. Within 16 tokens keys lie in the order ROW: then the registers in which a product leaves
its scores are those in which the next one takes its weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 448.0
HEADROOM = 8.0
GROUP = 16
"""Tokens among which keys are reordered; capacities are multiples of it."""
ROW = tuple(8 * (u >> 1 & 1) + 2 * (u >> 2) + (u & 1) for u in range(GROUP))
"""Row of token u of 16 among the keys."""
E4M3 = torch.float8_e4m3fn


class Scales(NamedTuple):
    """Per head, float32: `key_scale` [N], `key_center` [N, D], `value_scale` [N, D], `value_center`
    [N, D].
    """

    key_scale: Tensor
    key_center: Tensor
    value_scale: Tensor
    value_center: Tensor


class Codes(NamedTuple):
    """`keys` e4m3 [B, N, S, D], rows of each 16 in the order ROW; `values` e4m3 [B, N, D, S]; S a
    multiple of 16.
    """

    keys: Tensor
    values: Tensor
    scales: Scales


class CodedQueries(NamedTuple):
    """`codes` e4m3 [B, N, L, D]; `scale` float32 [B, N, L] turns a product with codes of keys into
    a score to the base 2.
    """

    codes: Tensor
    scale: Tensor


def new_codes(scales: Scales, *, batch: int, capacity: int) -> Codes:
    """Room for `capacity` tokens, holding zeros: what is never written must not be a NaN."""
    heads, width = scales.key_center.shape
    room = -(-capacity // GROUP) * GROUP
    keys = torch.zeros(batch, heads, room, width, dtype=E4M3, device=scales.key_scale.device)
    values = torch.zeros(batch, heads, width, room, dtype=E4M3, device=scales.key_scale.device)
    return Codes(keys, values, scales)


def scales_of(k: Tensor, v: Tensor) -> Scales:
    """Centers: means over tokens. Scales: a `HEADROOM`th of the range holds the largest key of a
    head, value of a channel.
    """
    k, v = (x.float() for x in (k, v))
    centers = [x.mean(dim=(0, 1)) for x in (k, v)]
    tops = [(x - center).abs().amax(dim=(0, 1)) for x, center in zip((k, v), centers, strict=True)]
    key, value = (
        top.clamp_min(1e-12) * (HEADROOM / LARGEST) for top in (tops[0].amax(dim=1), tops[1])
    )
    return Scales(key, centers[0], value, centers[1])


def rows_of(slots: Tensor) -> Tensor:
    """Rows in which the keys of tokens in `slots` lie."""
    order = torch.tensor(ROW, device=slots.device, dtype=slots.dtype)
    return slots // GROUP * GROUP + order[slots % GROUP]


def to_e4m3(x: Tensor) -> Tensor:
    """To the nearest code, cut off at the largest."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def write_reference(
    codes: Codes, slots: Tensor, k: Tensor, v: Tensor, *, at_slots: bool = False
) -> None:
    """Code `k`, `v` [B, L, N, D] into `slots` int64 [L]; `at_slots`: they lie in those slots of
    longer ones.
    """
    scales = codes.scales
    if at_slots:
        k, v = k[:, slots], v[:, slots]
    key = (k.float() - scales.key_center) / scales.key_scale[:, None]
    value = (v.float() - scales.value_center) / scales.value_scale
    for target, x, axis, at in (
        (codes.keys, key, 2, rows_of(slots)),
        (codes.values, value, 3, slots),
    ):
        order = (0, 2, 1, 3) if axis == 2 else (0, 2, 3, 1)
        # torch has no index_copy of e4m3; bytes do
        target.view(torch.uint8).index_copy_(
            axis, at, to_e4m3(x.permute(order)).contiguous().view(torch.uint8)
        )


def code_queries_reference(q: Tensor, scales: Scales, *, scale: float) -> CodedQueries:
    """`q` [B, L, N, D] under a scale per token and head; `scale` is that of the scores."""
    q = q.float().transpose(1, 2).contiguous()
    top = q.abs().amax(dim=3).clamp_min(1e-12)
    codes = to_e4m3(q * (LARGEST / top)[..., None])
    return CodedQueries(
        codes, top / LARGEST * scales.key_scale[:, None] * (scale * math.log2(math.e))
    )


def decoded(
    codes: Codes, count: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """What the first `count` tokens stand for: keys and values [B, count, N, D]."""
    scales = Scales(*(x.to(dtype) for x in codes.scales))
    rows = rows_of(torch.arange(count, device=codes.keys.device))
    k = codes.keys.to(dtype)[:, :, rows].transpose(1, 2)
    v = codes.values.to(dtype)[..., :count].permute(0, 3, 1, 2)
    return (
        k * scales.key_scale[:, None] + scales.key_center,
        v * scales.value_scale + scales.value_center,
    )
