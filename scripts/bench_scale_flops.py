"""Model FLOPs of a training iteration, and what share of a card's peak they are.

MFU = F / (seconds x GPUs x 989.4e12): F are the model FLOPs of all samples of an iteration, 989.4
TFLOP/s the dense bfloat16 peak of an H100 or H200 (SXM). F counts two per multiply-add in the
blocks of all passes that the objective needs (docs/reference/wan.md#cost; embeddings, head, norms
and the optimiser are left out, under 1 percent), and nothing that is done twice to save memory: no
recomputed block, no chunk of a rollout that is run again for its gradient. In units of one forward,
with c the share of visible (query, key) pairs whose key is a constant (a cache):

    pass                linear layers, cross-attention    self-attention
    without gradient    1                                 1
    tangent             2                                 3 - c
    with gradient       3                                 3 - c

Self-attention without gradient is two products per pair: scores and result. Their tangents are four
(scores from q and from k, result from scores and from v), the second of each only where keys have
tangents; the gradients are four (of v, scores, q, k), the first and last only where keys have them.
"""

from __future__ import annotations

from rcm.train.planner_job import Job, Pass, PhasePlan, visible_pairs
from rcm.train.planner_time import forward_work

PEAK = 989.4e12
"""FLOP/s of one H100 or H200 SXM, dense bfloat16, as published (NVIDIA H100 data sheet)."""


def pass_flops(job: Job, step: Pass) -> float:
    """Of one sample."""
    total = 0.0
    for layout, count in zip(step.layouts, step.repeats or (1.0,) * len(step.layouts), strict=True):
        work = forward_work(job.net(step.role).config, layout)
        if step.mode == "infer":
            total += count * sum(work)
            continue
        constant = 1 - visible_pairs(layout, first_key=layout.context_tokens) / visible_pairs(
            layout
        )
        linear = 2 if step.mode == "tangent" else 3
        total += count * (linear * (work.linear + work.cross) + (3 - constant) * work.attention)
    return total


def iteration_flops(job: Job, phase: PhasePlan) -> float:
    """Of all samples of an iteration of this kind. `job`: of the recipe without replay."""
    return job.global_batch * sum(pass_flops(job, step) for step in phase.passes)


def mfu(flops: float, *, seconds: float, gpus: int) -> float:
    """Share of the peak of `gpus` cards, in [0, 1]."""
    return flops / (seconds * gpus * PEAK)
