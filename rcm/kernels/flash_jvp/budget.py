"""How wrong a kernel may be: no hand-set tolerances, but twice the error of plain eager code in the
same dtype, both against float64.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rcm.kernels.flash_jvp.reference import reference_jvp
from rcm.kernels.flash_jvp.validation import Problem, Results

OUTPUTS = ("o", "o_dot", "lse")
ROUNDINGS = {"o": 0.5, "o_dot": 0.5, "lse": 2.0}
"""Least budget in units of the output dtype's eps: half for a rounded value; the log-sum-exp is
also converted from base 2 in float32.
"""


def float64_truth(problem: Problem) -> Results:
    """The reference in float64 on the same (rounded) inputs."""
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    q_dot, k_dot, v_dot = (
        None if x is None else x.double() for x in (problem.q_dot, problem.k_dot, problem.v_dot)
    )
    return reference_jvp(replace(problem, q=q, k=k, v=v, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot))


def low_precision_eager(problem: Problem) -> Results:
    """(o, o_dot, lse) as eager code in the input dtype gives them, every product and intermediate
    rounded to it: the yardstick.

    Builds the dense mask: sizes for tests only.
    """

    def padded(x: Tensor | None, before: int) -> Tensor | None:
        if x is None:
            return None
        return torch.cat([x.new_zeros(x.shape[0], before, *x.shape[2:]), x], dim=1).transpose(1, 2)

    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    q_dot = padded(problem.q_dot, 0)
    k_dot, v_dot = (padded(x, problem.tangent_start) for x in (problem.k_dot, problem.v_dot))
    scores = (q @ k.mT) * problem.scale
    if not problem.mask.is_full:
        scores = scores.masked_fill(~problem.mask.dense(scores.device), float("-inf"))
    p = scores.softmax(dim=-1)
    o = p @ v
    o_dot = torch.zeros_like(o) if v_dot is None else p @ v_dot
    slopes = [
        (a @ b.mT) * problem.scale
        for a, b in ((q_dot, k), (q, k_dot))
        if a is not None and b is not None
    ]
    if slopes:
        h = p * sum(slopes)
        o_dot = o_dot + h @ v - h.sum(dim=-1, keepdim=True) * o
    return (
        o.transpose(1, 2),
        o_dot.transpose(1, 2) if problem.has_tangent else None,
        scores.logsumexp(dim=-1),
    )


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64; anything non-finite counts as
    infinitely wrong.
    """
    error = (got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)
    return float(error) if torch.isfinite(error) else float("inf")


def errors_and_budgets(problem: Problem, got: Results) -> dict[str, tuple[float, float]]:
    """Per output that exists: (error of `got`, budget), both relative to float64.

    The budget is twice the error of `low_precision_eager`, and never below `ROUNDINGS`: where the
    eager code happens to be exact (one key), a correctly rounded result must still pass.
    """
    truth, eager = float64_truth(problem), low_precision_eager(problem)
    report = {}
    for name, mine, theirs, exact in zip(OUTPUTS, got, eager, truth, strict=True):
        if mine is not None and theirs is not None and exact is not None:
            least = ROUNDINGS[name] * torch.finfo(mine.dtype).eps
            budget = max(2 * relative_error(theirs, exact), least)
            report[name] = relative_error(mine, exact), budget
    return report
