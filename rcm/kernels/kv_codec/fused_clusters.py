"""`clusters.spherical` with one map for all heads in two launches per iteration, and the means of
raw tokens by 16-bit products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.kernels.launching import FLOATS, device_of, runs_on

TILE = 64
"""Tokens, and clusters, that a program takes at a time."""
RECENTRED = 4
"""Clusters per program of `recentre`: it reads all tiles, so many programs share the work."""


def spherical(
    x: Tensor, k: int, *, iters: int, start: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Assignments int32 [B, S] and unit centres [B, 1, k, D] of `x` [B, S, N, D] by the means over
    its heads; None where kernels cannot run. As `clusters.spherical` of `clusters.features`, but
    for the last bits of sums.
    """
    b, s, n, d = x.shape
    if not (
        runs_on(x)
        and x.dtype in FLOATS
        and x.stride(3) == 1
        and d >= 16
        and d & (d - 1) == 0
        and d <= 256
    ):
        return None
    from rcm.kernels.kv_codec import cluster_kernels as kernels

    tiles = -(-s // TILE)
    points = x.new_empty(b, s, d, dtype=torch.float32)
    partial = x.new_empty(b, tiles, k, d, dtype=torch.float32)
    assigned = x.new_empty(b, s, dtype=torch.int32)
    with device_of(x):
        kernels.features[(-(-s // 16), b)](
            x, points, x.stride()[:3], (s, n), TOKENS=16, D=d, num_warps=4
        )
        if start is not None and start.shape == (b, 1, k, d):
            centres = F.normalize(start.float(), dim=-1).squeeze(1)
        else:
            centres = points[:, torch.linspace(0, s - 1, k, device=x.device).round().long()]
        for _ in range(max(1, iters)):
            kernels.assign[(tiles, b)](
                points, centres, assigned, partial, s, k, tiles,
                TOKENS=TILE, CLUSTERS=TILE, D=d, num_warps=4,
            )  # fmt: skip
            centres = torch.empty_like(centres)
            kernels.recentre[(-(-k // RECENTRED), b)](
                partial, centres, k, tiles, CLUSTERS=RECENTRED, D=d, num_warps=4
            )
    return assigned, centres.unsqueeze(1)


def member_means(x: Tensor, assigned: Tensor, k: int) -> Tensor | None:
    """`clusters.member_means` of 16-bit `x` on CUDA with one map for all heads, float32 [B, k, N,
    D]: the indicator matrix and the tokens are exact in 16 bits, and sums are taken in float32.
    None elsewhere.
    """
    if not (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and assigned.dim() == 2):
        return None
    belongs = assigned.unsqueeze(1) == torch.arange(k, device=x.device, dtype=assigned.dtype).view(
        1, k, 1
    )
    sums = torch.bmm(belongs.to(x.dtype), x.flatten(2), out_dtype=torch.float32)
    return (sums / belongs.sum(-1, keepdim=True).clamp(min=1)).unflatten(2, x.shape[2:])
