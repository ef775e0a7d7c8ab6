"""Regressions of a velocity or a data prediction: causal diffusion (stage 1), the fake score, and
ODE pairs (Causal_rCM.md sections 3, 6, 7, 8).

Latents [B, C, T, H, W]; RF times [B, 1] or [B, T] float64 in [0, 1]; targets are constants. Every
loss is a mean over the local batch of a per-sample value. `ValueError` on unequal shapes or a bad
time shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rcm.diffusion.interpolant import rf_velocity, scale_per_frame
from rcm.diffusion.time import per_frame
from rcm.losses.term import (
    LossTerm,
    NonFinitePolicy,
    frame_sum,
    require_videos,
    sample_mean,
    sample_sum,
    screen_samples,
)

TimeWeight = Callable[[torch.Tensor], torch.Tensor]


def gaussian_bell(t_rf: torch.Tensor) -> torch.Tensor:
    """w(t) = exp(-2 (t - 1/2)^2) - exp(-1/2): 0 at t = 0 and 1, 0.393 at 1/2 (Causal_rCM.md section
    3; the teacher-forcing experiments).
    """
    return torch.exp(-2 * (t_rf - 0.5) ** 2) - math.exp(-0.5)


def diffusion_loss(
    v: torch.Tensor,
    x0: torch.Tensor,
    eps: torch.Tensor,
    t_rf: torch.Tensor,
    *,
    weight: TimeWeight | None = None,
    loss_scale: float = 100.0,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "diffusion",
) -> LossTerm:
    """loss_scale * sum over frames of w(t) mean over [C, H, W] of (v - (eps - x0))^2 (Causal-rCM
    eq. 8-9; Causal_rCM.md section 3).

    `weight` maps the times elementwise (`gaussian_bell`), None is 1. With times [B, T] each frame
    has its own weight (diffusion forcing).
    """
    require_videos(v=v, x0=x0, eps=eps)
    (v, target), bad = screen_samples(nonfinite, v, rf_velocity(x0, eps).detach())
    w = torch.ones_like(t_rf) if weight is None else weight(t_rf)
    per_sample = frame_sum(scale_per_frame(w, (v - target) ** 2))
    return LossTerm(name, loss_scale * per_sample.mean(), {f"{name}/nonfinite_samples": bad})


def bidirectional_critic_loss(
    v_fake: torch.Tensor,
    generated: torch.Tensor,
    eps: torch.Tensor,
    tau: torch.Tensor,
    *,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "fake_score",
) -> LossTerm:
    """Fake-score regression of bidirectional rCM: sum of (G - x0_fake)^2 / sin^2(tau)
    (Causal_rCM.md section 8), at TrigFlow time tau in [0, pi/2].

    Computed as b^2 sum (v_fake - (eps - G))^2 with b = 1 / (cos + sin), the same number without a
    division by sin: finite at tau = 0. `generated` is a constant; `v_fake` is the network's RF
    velocity, with graph.
    """
    require_videos(v_fake=v_fake, generated=generated, eps=eps)
    (v_fake, target), bad = screen_samples(nonfinite, v_fake, rf_velocity(generated, eps).detach())
    b = 1 / (torch.cos(tau) + torch.sin(tau))
    per_sample = sample_sum(scale_per_frame(b, v_fake - target) ** 2)
    return LossTerm(name, per_sample.mean(), {f"{name}/nonfinite_samples": bad})


def causal_critic_loss(
    v_fake: torch.Tensor,
    generated: torch.Tensor,
    eps: torch.Tensor,
    *,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "fake_score",
) -> LossTerm:
    """Fake-score regression of self-forced DMD (Causal_rCM.md section 6, decision A7): mean over
    [C, T, H, W] of (v_fake - (eps - G))^2, G constant.
    """
    require_videos(v_fake=v_fake, generated=generated, eps=eps)
    (v_fake, target), bad = screen_samples(nonfinite, v_fake, rf_velocity(generated, eps).detach())
    per_sample = sample_mean((v_fake - target) ** 2)
    return LossTerm(name, per_sample.mean(), {f"{name}/nonfinite_samples": bad})


def ode_pair_loss(
    x0_student: torch.Tensor,
    endpoint: torch.Tensor,
    t_rf: torch.Tensor,
    *,
    loss_scale: float = 1.0,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "ode_pairs",
) -> LossTerm:
    """loss_scale * mean squared error of the student's data prediction against the trajectory's end
    (TF-KD, DF-KD; Causal_rCM.md section 7).

    Frames at t = 0 are masked: they are the endpoint already; the mean runs over the frames that
    remain, and a sample without any adds 0.
    """
    require_videos(x0_student=x0_student, endpoint=endpoint)
    (x0_student, endpoint), bad = screen_samples(nonfinite, x0_student, endpoint.detach())
    kept = (
        (per_frame(t_rf, x0_student) > 0)
        .to(x0_student.dtype)
        .expand(-1, -1, x0_student.shape[2], 1, 1)
    )
    per_frame_mse = ((x0_student - endpoint) ** 2).mean(dim=(1, 3, 4), keepdim=True)
    per_sample = sample_sum(kept * per_frame_mse) / kept.flatten(1).sum(1).clamp_min(1)
    return LossTerm(name, loss_scale * per_sample.mean(), {f"{name}/nonfinite_samples": bad})


def pick_states(trajectory: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """States [B, C, T, H, W] of stored ODE trajectories [B, K, C, T, H, W] (index 0 = clean), one
    index per sample or frame.

    `index` int64 [B, 1] or [B, T] in 0..K-1. `ValueError` on other shapes.
    """
    if trajectory.dim() != 6:
        raise ValueError(
            f"trajectory has shape {tuple(trajectory.shape)}, expected [B, K, C, T, H, W]"
        )
    index = per_frame(index, trajectory[:, 0]).unsqueeze(1).expand_as(trajectory[:, :1])
    return trajectory.gather(1, index).squeeze(1)
