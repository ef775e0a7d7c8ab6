"""The Triton kernel of `deposit`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rcm.kernels.launching import device_of

BLOCK = 4096
"""Elements per program."""


@triton.jit
def _deposit(target, part, first, stride, length, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one contiguous run of `length` elements; run i begins at `first + i stride` in
    the target and `i length` in the part.
    """
    run = tl.program_id(1).to(tl.int64)
    inside = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = inside < length
    value = tl.load(part + run * length + inside, mask=keep).to(tl.float32)
    place = target + first + run * stride + inside
    if ADD:
        value += tl.load(place, mask=keep).to(tl.float32)
    tl.store(place, value.to(target.dtype.element_ty), mask=keep)


def launch_deposit(target: Tensor, part: Tensor, *, start: int, step: int, add: bool) -> None:
    """See `deposit.deposit`; both tensors contiguous, float32 or narrower."""
    count, length = part.shape[:2]
    width = target.shape[1] * target.shape[2]
    grid = (triton.cdiv(length * width, BLOCK), count)
    with device_of(target):
        _deposit[grid](
            target, part, start * width, step * width, length * width,
            ADD=add, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
