"""Partial results into a running sum: rows of a batched call, each a contiguous run, added or
copied with a change of dtype.

torch adds tensors of two dtypes at half the memory bandwidth; in a backward pass of 40 ms that is a
millisecond or two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def deposit(target: Tensor, part: Tensor, *, start: int, step: int, add: bool) -> None:
    """target[start + i step + j] (+)= part[i, j] for `target` [L, N, D] and `part` [C, length, N,
    D]; the ranges are disjoint.

    Computes in float32 or wider and rounds once. CUDA tensors without gaps take one kernel, others
    torch's addition: the same numbers.
    """
    count, length = part.shape[:2]
    if (
        target.is_cuda
        and target.is_contiguous()
        and part.is_contiguous()
        and target.dtype != torch.float64
    ):
        # Triton is imported only on CUDA
        from rcm.kernels.masked_attention.deposit_kernel import launch_deposit

        launch_deposit(target, part, start=start, step=step, add=add)
        return
    for i in range(count):
        rows = target[start + i * step : start + i * step + length]
        if add:
            rows.add_(part[i])
        else:
            rows.copy_(part[i])
