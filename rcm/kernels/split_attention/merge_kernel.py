"""The Triton kernel that merges partial attention results."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rcm.kernels.launching import device_of

ROWS = 32


@triton.jit
def _nth(i: tl.constexpr, x0, x1, x2, x3, x4, x5):
    return x0 if i == 0 else (
        x1 if i == 1 else (x2 if i == 2 else (x3 if i == 3 else (x4 if i == 4 else x5)))
    )  # fmt: skip


@triton.jit
def _merge(
    out, o0, o1, o2, o3, o4, o5, l0, l1, l2, l3, l4, l5, length, heads,
    o_batch, o_head, o_row,
    PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """`ROWS` queries of one head: weights from the log-sum-exps [B, N, L], then a weighted sum of
    up to six results.
    """
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    keep = row < length
    inside = keep[:, None] & (column < WIDTH)[None, :]
    place = (
        (pair // heads) * o_batch
        + (pair % heads) * o_head
        + row.to(tl.int64)[:, None] * o_row
        + column[None, :]
    )
    stats = pair * length + row
    top = tl.load(l0 + stats, mask=keep, other=0.0)
    for i in tl.static_range(1, PARTS):
        lse = _nth(i, l0, l1, l2, l3, l4, l5)
        top = tl.maximum(top, tl.load(lse + stats, mask=keep, other=0.0))
    total = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    weights = tl.zeros([ROWS], dtype=tl.float32)
    for i in tl.static_range(0, PARTS):
        part, lse = _nth(i, o0, o1, o2, o3, o4, o5), _nth(i, l0, l1, l2, l3, l4, l5)
        weight = tl.exp(tl.load(lse + stats, mask=keep, other=0.0) - top)
        weights += weight
        total += weight[:, None] * tl.load(part + place, mask=inside, other=0.0).to(tl.float32)
    result = total / weights[:, None]
    batch, head = pair // heads, pair % heads
    target = ((batch * length + row)[:, None] * heads + head) * WIDTH + column[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=inside)


def merge(outputs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """As `api.merge_reference`; outputs share their strides, log-sum-exps are float32 and
    contiguous.
    """
    batch, heads, length, width = outputs[0].shape
    out = outputs[0].new_empty(batch, length, heads, width)
    padded = [xs + [xs[0]] * (6 - len(xs)) for xs in (outputs, [lse.contiguous() for lse in lses])]
    grid = (triton.cdiv(length, ROWS), batch * heads)
    with device_of(out):
        _merge[grid](
            out, *padded[0], *padded[1], length, heads, *outputs[0].stride()[:3],
            PARTS=len(outputs), ROWS=ROWS, WIDTH=width, PADDED=triton.next_power_of_2(width),
            num_warps=4,
        )  # fmt: skip
    return out
