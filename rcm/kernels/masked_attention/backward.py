"""Gradient of masked attention as a sum over dense rectangles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rcm.kernels.masked_attention.dense import RectangleBackward
from rcm.kernels.masked_attention.deposit import deposit
from rcm.kernels.masked_attention.rectangles import Comb, combs
from rcm.kernels.masks import MaskSpec


@dataclass(frozen=True)
class Teeth:
    """The token ranges of one axis of a comb: `count` ranges of `length`, the i-th from `start + i
    step`.
    """

    start: int
    length: int
    step: int
    count: int

    def cut(self, x: Tensor, *, dim: int = 0) -> Tensor:
        """View of `x` with the ranges stacked in a new first axis."""
        stop = self.start + (self.count - 1) * self.step + self.length
        # [..., count, ..., length]
        view = x.narrow(dim, self.start, stop - self.start).unfold(dim, self.length, self.step)
        return view.movedim(-1, dim + 1).movedim(dim, 0)

    def part(self, first: int, last: int) -> Teeth:
        """Only the ranges `first` to `last` (exclusive)."""
        return Teeth(self.start + first * self.step, self.length, self.step, last - first)


class Move(NamedTuple):
    """Ranges `[first, last)` of a call's result: into the wide sum or straight into the result, by
    addition or by copy.
    """

    first: int
    last: int
    wide: bool
    add: bool


class Sum(NamedTuple):
    """How the results of several calls add up along one axis.

    Tokens outside `[start, stop)` get at most one contribution and go straight to the result; the
    others are summed in a wider dtype. `clear`: some token gets no contribution, or a range is
    partly written, so everything starts at zero. `moves`: per call.
    """

    start: int
    stop: int
    clear: bool
    moves: tuple[tuple[Move, ...], ...]


@lru_cache(maxsize=256)
def plan_sum(calls: tuple[Teeth, ...], length: int) -> Sum:
    """The cheapest way to add up the results of `calls` along an axis of `length` tokens."""
    ranges = [
        (t.start + i * t.step, t.start + i * t.step + t.length)
        for t in calls
        for i in range(t.count)
    ]
    touched = torch.zeros(length, dtype=torch.int32)
    for start, stop in ranges:
        touched[start:stop] += 1
    shared = (touched > 1).nonzero().flatten()
    lo, hi = (int(shared[0]), int(shared[-1]) + 1) if len(shared) else (0, 0)
    # no range crosses an end of the sum
    while cut := [r for r in ranges if r[0] < hi and r[1] > lo and (r[0] < lo or r[1] > hi)]:
        lo, hi = min(lo, *(r[0] for r in cut)), max(hi, *(r[1] for r in cut))
    seen = torch.zeros(length, dtype=torch.bool)
    mixed, moves = bool((touched == 0).any()), []
    for teeth in calls:
        kinds = []
        for i in range(teeth.count):
            start = teeth.start + i * teeth.step
            before = seen[start : start + teeth.length]
            mixed |= bool(before.any()) and not bool(before.all())
            kinds.append((lo <= start < hi, bool(before.any())))
            seen[start : start + teeth.length] = True
        moves.append(_runs(kinds))
    return Sum(lo, hi, mixed, tuple(moves))


def _runs(kinds: list[tuple[bool, bool]]) -> tuple[Move, ...]:
    """Consecutive ranges of one kind as one move."""
    moves: list[Move] = []
    for i, (wide, add) in enumerate(kinds):
        if moves and (moves[-1].wide, moves[-1].add) == (wide, add):
            moves[-1] = moves[-1]._replace(last=i + 1)
        else:
            moves.append(Move(i, i + 1, wide, add))
    return tuple(moves)


def _allocate(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of which every element is written (tests fill it with NaN)."""
    return torch.empty(shape, dtype=dtype, device=device)


class _Accumulator:
    """One gradient [L, N, D] of one batch entry while its contributions arrive."""

    def __init__(self, out: Tensor, calls: tuple[Teeth, ...]) -> None:
        self.out, self.calls, self.plan = out, calls, plan_sum(calls, out.shape[0])
        rows = self.plan.stop - self.plan.start
        wide_dtype = torch.promote_types(out.dtype, torch.float32)
        self.wide = out.narrow(0, self.plan.start, rows)
        if wide_dtype != out.dtype and rows:
            self.wide = _allocate(self.wide.shape, wide_dtype, out.device)
        if self.plan.clear:
            out.zero_()
            self.wide.zero_()

    def receive(self, call: int, result: Tensor) -> None:
        """Take the result [C, length, N, D] of one call."""
        for move in self.plan.moves[call]:
            teeth = self.calls[call].part(move.first, move.last)
            part = result[move.first : move.last]
            if move.wide:
                add = move.add or self.plan.clear
                deposit(
                    self.wide, part, start=teeth.start - self.plan.start, step=teeth.step, add=add
                )
            else:
                deposit(self.out, part, start=teeth.start, step=teeth.step, add=move.add)

    def finish(self) -> None:
        """Round the sum."""
        if self.wide.dtype != self.out.dtype:
            deposit(self.out, self.wide[None], start=self.plan.start, step=0, add=False)


def masked_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    mask: MaskSpec,
    scale: float,
    rectangle: RectangleBackward,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of attention under `mask`: every visible (query, key) pair in exactly one call
    of `rectangle`.

    `grad_o`, `o` [B, Lq, N, Dv], `q` [B, Lq, N, D], `k` [B, Lk, N, D], `v` [B, Lk, N, Dv], `lse`
    [B, N, Lq]. Contributions are summed in float32 (float64 for float64) and rounded once; keys
    that no query sees get zero. Results are contiguous, in the dtype of q.
    """
    calls = combs(mask)
    queries = tuple(Teeth(c.q_start, c.q_len, c.q_step, c.count) for c in calls)
    keys = tuple(Teeth(c.k_start, c.k_len, c.k_step, c.count) for c in calls)
    # cuDNN's plans are cached by the strides of q, k and v alone: those of o and grad_o must follow
    grad_o = grad_o.contiguous()
    dq, dk, dv = (_allocate(x.shape, x.dtype, x.device) for x in (q, k, v))
    for b in range(q.shape[0]):
        sums = [
            _Accumulator(grad[b], teeth) for grad, teeth in ((dq, queries), (dk, keys), (dv, keys))
        ]
        for call, (rows, columns) in enumerate(zip(queries, keys, strict=True)):
            row_lse = rows.cut(lse[b], dim=1).contiguous()
            parts = rectangle(
                rows.cut(grad_o[b]),
                rows.cut(q[b]),
                columns.cut(k[b]),
                columns.cut(v[b]),
                rows.cut(o[b]),
                row_lse,
                scale=scale,
            )
            for total, part in zip(sums, parts, strict=True):
                total.receive(call, part)
        for total in sums:
            total.finish()
    return dq, dk, dv


def describe(calls: tuple[Comb, ...]) -> str:
    """A line per dense call, for benchmarks and errors."""
    return "\n".join(
        f"{c.count} x [{c.q_len} queries x {c.k_len} keys] from ({c.q_start}, {c.k_start}) in steps"
        f" of ({c.q_step}, {c.k_step})"
        for c in calls
    )
