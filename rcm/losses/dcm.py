"""Discrete-time consistency (dCM): the student's data prediction at one time against its own,
gradient-free, nearer to the data (Causal_rCM.md sections 4, 8; Causal-rCM eq. 10).

The method supplies the pair: times from `diffusion.time_sampling.ConsistencyGrid`, teacher steps by
`interpolant.trig_euler` (bidirectional) or `interpolant.rf_euler` (causal).
"""

from __future__ import annotations

import torch

from rcm.losses.term import (
    LossTerm,
    NonFinitePolicy,
    Reduction,
    frame_sum,
    require_videos,
    sample_sum,
    screen_samples,
)


def bidirectional_dcm(
    x0_student: torch.Tensor,
    x0_target: torch.Tensor,
    *,
    loss_scale: float = 100.0,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "dcm",
) -> LossTerm:
    """loss_scale * sum over [C, T, H, W] of (f_theta(x_0) - f_theta^-(x_k))^2, mean over the batch
    (Causal_rCM.md section 8; weight 1, plain MSE).

    [B, C, T, H, W] each; `x0_target` is treated as a constant. `ValueError` on unequal shapes.
    """
    return _squared_error(x0_student, x0_target, sample_sum, loss_scale, nonfinite, name)


def causal_dcm(
    x0_student: torch.Tensor,
    x0_target: torch.Tensor,
    *,
    loss_scale: float = 100.0,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "tf_dcm",
) -> LossTerm:
    """loss_scale * sum over frames of the mean over [C, H, W] of the squared difference, mean over
    the batch (Causal-rCM eq. 10; Causal_rCM.md section 4).

    [B, C, T, H, W] each, noisy half only; `x0_target` is treated as a constant. `ValueError` on
    unequal shapes.
    """
    return _squared_error(x0_student, x0_target, frame_sum, loss_scale, nonfinite, name)


def _squared_error(
    x0_student: torch.Tensor,
    x0_target: torch.Tensor,
    reduction: Reduction,
    loss_scale: float,
    nonfinite: NonFinitePolicy,
    name: str,
) -> LossTerm:
    require_videos(x0_student=x0_student, x0_target=x0_target)
    (x0_student, x0_target), bad = screen_samples(nonfinite, x0_student, x0_target.detach())
    per_sample = reduction((x0_student - x0_target) ** 2)
    return LossTerm(name, loss_scale * per_sample.mean(), {f"{name}/nonfinite_samples": bad})
