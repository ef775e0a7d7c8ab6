"""Eager attention with tangent for any mask: the definition that the kernel is measured against,
and the choice without Triton.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from rcm.kernels.flash_jvp.validation import Problem, Results
from rcm.kernels.masks import Intervals

SCORES_PER_CHUNK = 1 << 24
"""Upper bound of the score matrix held at once, in elements: 64 MiB in float32."""


def reference_jvp(problem: Problem) -> Results:
    """Primal, tangent and log-sum-exp in float32 (float64 for float64 inputs), O and O_dot returned
    in the input dtype.

    With S = scale q k^T, P = softmax(S), S_dot = scale (q_dot k^T + q k_dot^T), H = P * S_dot: O =
    P v, O_dot = P v_dot + H v - rowsum(H) * O, lse = log sum exp S (Causal-rCM section 3.2.2).
    Terms of absent tangents are not computed; O_dot is None if all three are absent. Works through
    each run of queries with equal keys in pieces, gathering only the keys that it sees, so memory
    stays bounded at any length. Autocast is switched off.
    """
    q = problem.q
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_len, heads, _ = q.shape
    o = q.new_empty(batch, q_len, heads, problem.v.shape[3])
    o_dot = torch.empty_like(o) if problem.has_tangent else None
    lse = q.new_empty(batch, heads, q_len, dtype=compute)
    with torch.autocast(q.device.type, enabled=False):
        for segment in problem.mask.row_segments():
            keys = _gather_keys(problem, segment.intervals, compute)
            step = max(1, SCORES_PER_CHUNK // (batch * heads * keys[0].shape[2]))
            for start in range(segment.q_start, segment.q_stop, step):
                rows = slice(start, min(start + step, segment.q_stop))
                queries = (_heads_first(q[:, rows], compute), _maybe(problem.q_dot, rows, compute))
                out, out_dot, row_lse = _attend(queries, keys, scale=problem.scale)
                o[:, rows] = out.transpose(1, 2)
                lse[:, :, rows] = row_lse
                if o_dot is not None:
                    o_dot[:, rows] = (
                        torch.zeros_like(out).transpose(1, 2)
                        if out_dot is None
                        else out_dot.transpose(1, 2)
                    )
    return o, o_dot, lse


def _attend(
    queries: tuple[Tensor, Tensor | None],
    keys: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    scale: float,
) -> Results:
    """Dense attention of [B, N, L, D] queries over gathered keys; a tangent is None where it is
    zero for all of these keys.
    """
    (q, q_dot), (k, v, k_dot, v_dot) = queries, keys
    scores = scale * (q @ k.mT)
    lse = scores.logsumexp(dim=-1)
    p = (scores - lse[..., None]).exp_()
    o = p @ v
    tangent_terms = [] if v_dot is None else [p @ v_dot]
    score_terms = [a @ b.mT for a, b in ((q_dot, k), (q, k_dot)) if a is not None and b is not None]
    if score_terms:
        h = p * (scale * sum(score_terms))
        tangent_terms += [h @ v, -h.sum(dim=-1, keepdim=True) * o]
    return o, reduce(torch.add, tangent_terms) if tangent_terms else None, lse


def _gather_keys(
    problem: Problem, intervals: Intervals, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """k, v and their tangents over the union of `intervals`; rows before `tangent_start` get the
    zeros that they stand for.
    """
    start = problem.tangent_start

    def primal(x: Tensor) -> Tensor:
        return _heads_first(torch.cat([x[:, a:b] for a, b in intervals], dim=1), dtype)

    def tangent(x: Tensor | None) -> Tensor | None:
        if x is None or intervals[-1][1] <= start:
            return None
        pieces = []
        for a, b in intervals:
            split = min(max(a, start), b)
            pieces += [
                x.new_zeros(x.shape[0], split - a, *x.shape[2:]),
                x[:, max(split - start, 0) : max(b - start, 0)],
            ]
        return _heads_first(torch.cat(pieces, dim=1), dtype)

    return primal(problem.k), primal(problem.v), tangent(problem.k_dot), tangent(problem.v_dot)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(1, 2).to(dtype)


def _maybe(x: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else _heads_first(x[:, rows], dtype)
