"""Softmax attention over keys that come in segments, one restored at a time: each gives its output
and log-sum-exp; these merge exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcm.kernels.masks import MaskSpec

Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(q [B, L, N, D], k, v [B, S, N, D], scale) -> (output [B, L, N, D], log-sum-exp of the scaled
logits [B, N, L]).
"""


class Segment(NamedTuple):
    """Keys and values [B, S, N, D] and what their attention mass is too large by, in logits: [B, N,
    L] (`bias.segment_gain`) or None.
    """

    k: Tensor
    v: Tensor
    gain: Tensor | None = None


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one segment, materialised, in the dtype of the inputs but at least float32."""
    work = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("blnd,bsnd->bnls", q.to(work), k.to(work)) * scale
    lse = logits.logsumexp(-1)
    return torch.einsum("bnls,bsnd->blnd", (logits - lse.unsqueeze(-1)).exp(), v.to(work)), lse


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same by torch's FlashAttention, which also gives the log-sum-exp; on CUDA in bf16 or
    fp16.
    """
    operands = [x.transpose(1, 2) for x in (q, k, v)]
    if q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*operands, scale=scale)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *operands, scale=scale
        )
    return out.transpose(1, 2), lse


def attend_segments(
    q: Tensor, segments: Iterable[Segment], *, scale: float, attend: Attend = plain
) -> Tensor:
    """softmax(scale q k^T - gain) v over all segments together: [B, L, N, D] in the dtype of `q`;
    `ValueError` without any.

    Takes one segment after another, so an iterator may restore each into the same memory. Sums are
    float32 (float64 for such inputs).
    """
    work = torch.promote_types(q.dtype, torch.float32)
    found: tuple[Tensor, Tensor] | None = None
    for segment in segments:
        if segment.k.shape[1] == 0:
            continue
        part, lse = attend(q, segment.k, segment.v, scale)
        part, lse = part.to(work), lse if segment.gain is None else lse - segment.gain
        if found is None:
            found = part, lse
            continue
        out, total = found
        merged = torch.logaddexp(total, lse)
        found = out * _weight(total - merged) + part * _weight(lse - merged), merged
    if found is None:
        raise ValueError("attention needs at least one key; every segment was empty")
    return found[0].to(q.dtype)


class Part(NamedTuple):
    """Keys [start, stop) of a call, and their gain (`Segment`)."""

    start: int
    stop: int
    gain: Tensor | None = None


def attend_parts(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], *, scale: float, mask: MaskSpec | None
) -> Tensor:
    """`attend_segments` over keys and values [B, S, N, D] that `parts` cut, under a mask: [B, L, N,
    D].
    """
    attend = flash if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) else plain
    runs = [(0, q.shape[1], ((0, k.shape[1]),))] if mask is None else mask.row_segments()
    found = []
    for first, last, intervals in runs:
        cut = [
            (max(a, part.start), min(b, part.stop), part.gain)
            for a, b in intervals
            for part in parts
        ]
        segments = [
            Segment(k[:, a:b], v[:, a:b], None if gain is None else gain[:, :, first:last])
            for a, b, gain in cut
            if a < b
        ]
        found.append(attend_segments(q[:, first:last], segments, scale=scale, attend=attend))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _weight(log: Tensor) -> Tensor:
    """[B, N, L] -> [B, L, N, 1]."""
    return log.exp().transpose(1, 2).unsqueeze(-1)
