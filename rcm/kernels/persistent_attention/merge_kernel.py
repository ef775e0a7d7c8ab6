"""The Triton kernel that merges the parts which the persistent kernel leaves of query tiles that
were cut along the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _owner(unit, sharers, shared):
    """The program whose share of all `shared` units holds `unit`."""
    return ((unit + 1) * sharers - 1) // shared


@triton.jit(
    do_not_specialize=[
        "whole",
        "remaining",
        "blocks",
        "sharers",
        "heads",
        "tiles_per_head",
        "q_len",
    ]
)
def merge_parts(
    part_o, part_lse, out, whole, remaining, blocks, sharers, heads, tiles_per_head, q_len,
    stride_b, stride_l, stride_n,
    TILE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of one query tile that remains behind the `whole` ones of all programs: its
    parts, weighed by their base-2 log-sum-exps. Parts are [2 programs, TILE, WIDTH]: two for each
    program, for the first and for the second query tile of its share.
    """
    index, line = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    shared = remaining * blocks
    first = _owner(index * blocks, sharers, shared)
    last = _owner((index + 1) * blocks - 1, sharers, shared)
    if first < last:
        column = tl.arange(0, WIDTH)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for program in range(first, last + 1):
            start = program * shared // sharers
            if start < (program + 1) * shared // sharers:
                second = start // blocks != index
                place = (2 * program + second.to(tl.int32)).to(tl.int64) * TILE + line
                lse = tl.load(part_lse + place)
                raised = tl.maximum(top, lse)
                keep, share = tl.exp2(top - raised), tl.exp2(lse - raised)
                weight = weight * keep + share
                part = tl.load(part_o + place[:, None] * WIDTH + column[None, :]).to(tl.float32)
                total = total * keep[:, None] + share[:, None] * part
                top = raised
        tile = whole + index
        pair = tile // tiles_per_head
        row = (tile % tiles_per_head) * TILE + line
        base = (
            out + (pair // heads).to(tl.int64) * stride_b + (pair % heads).to(tl.int64) * stride_n
        )
        target = base + row.to(tl.int64)[:, None] * stride_l + column[None, :]
        tl.store(
            target, (total / weight[:, None]).to(out.dtype.element_ty), mask=(row < q_len)[:, None]
        )
