"""Attention over codes as a formula, in torch: what the kernels compute, but for the rounding of
the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rcm.kernels.fp8_attention.codes import CodedQueries, Codes, rows_of

TOP = 8.0
"""The largest weight of a row is stored as 2**TOP."""


def attend_reference(
    queries: CodedQueries, codes: Codes, *, count: int, dtype: torch.dtype
) -> Tensor:
    """Attention of coded queries to the first `count` tokens of `codes`, [B, L, N, D] in `dtype`.

    Weights are rounded to e4m3 as in the kernels, relative to the true maximum of their row instead
    of a running one.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rows = rows_of(torch.arange(count, device=codes.keys.device))
    scores = (
        queries.codes.to(wide)
        @ codes.keys[:, :, rows].to(wide).mT
        * queries.scale.to(wide)[..., None]
    )
    p = (scores - scores.amax(dim=-1, keepdim=True) + TOP).mul(math.log(2)).exp()
    total = p.sum(dim=-1, keepdim=True)
    found = p.to(torch.float8_e4m3fn).to(wide) @ codes.values[..., :count].to(wide).mT
    found = (
        found / total * codes.scales.value_scale.to(wide)[:, None]
        + codes.scales.value_center.to(wide)[:, None]
    )
    return found.transpose(1, 2).to(dtype)
