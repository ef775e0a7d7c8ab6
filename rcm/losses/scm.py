"""Continuous-time consistency (sCM): the tangent in both parameterisations, its normalisation, and
the regression (Causal_rCM.md sections 5, 8).

The tangent g is the weighted time derivative of the consistency function along the teacher's ODE.
RF-native, for the causal stages, and TrigFlow, for the bidirectional ancestor, stand side by side.
At full warm-up

    g_trig = cos(tau) b^2 h,    g_rf = h,    h = V - v - t J,    b = 1 / (cos + sin)

(Causal-rCM appendix A; one time per sample), so both vanish at the same student; their normalised
losses weigh samples differently. Latents [B, C, T, H, W]; times [B, 1] or [B, T], float64; students
and teachers are constants here (theta^- = stop-gradient of the live student).
"""

from __future__ import annotations

from typing import Literal

import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.interpolant import scale_per_frame
from rcm.losses.term import (
    LossTerm,
    NonFinitePolicy,
    require_videos,
    sample_sum,
    screen_samples,
)

TrigVariant = Literal["paper", "release", "original"]


def warmup_ratio(iteration: int, *, warmup_steps: int) -> float:
    """Tangent warm-up r = min(1, iteration / warmup_steps) of the raw trainer iteration; 1 when
    `warmup_steps` is 0 (Causal_rCM.md section 5).
    """
    if iteration < 0 or warmup_steps < 0:
        raise ValueError(
            f"warmup_ratio needs iteration and tangent_warmup >= 0, got {iteration} and"
            f" {warmup_steps}"
        )
    return 1.0 if warmup_steps == 0 else min(1.0, iteration / warmup_steps)


def rf_tangent(
    v_student: torch.Tensor,
    v_teacher: torch.Tensor,
    jvp: torch.Tensor,
    t_rf: torch.Tensor,
    *,
    warmup: float = 1.0,
) -> torch.Tensor:
    """g = -(v - V) - r t J (Causal-rCM eq. 17-18), without graph; at r = 1 the derivative df/dt of
    f = x - t v along the teacher's ODE.

    `jvp` J = d_x v . V + d_t v with t in [0, 1]; `warmup` r in [0, 1]. `ValueError` on unequal
    shapes, a bad time shape, or r out of range.
    """
    _check(warmup, v_student=v_student, v_teacher=v_teacher, jvp=jvp)
    return (v_teacher - v_student).detach() - warmup * scale_per_frame(t_rf, jvp.detach())


def trigflow_tangent(
    F_student: torch.Tensor,
    F_teacher: torch.Tensor,
    jvp_cs: torch.Tensor,
    x_tau: torch.Tensor,
    tau: torch.Tensor,
    *,
    warmup: float = 1.0,
    variant: TrigVariant = "paper",
) -> torch.Tensor:
    """TrigFlow tangent g, cos(tau) df/dtau at r = 1, without graph (Causal_rCM.md section 8; rCM
    algorithm 1).

    paper:    -cos sqrt(1 - r^2 sin^2) (F - F_T) - r (cos sin x + jvp_cs)      warm-up multiplies
              every r-term (decision A2)
    release:  -cos sqrt(1 - r^2 sin^2) (F - F_T) - (r cos sin x + jvp_cs)      the later public code
              leaves the JVP term at full weight
    original: -cos^2 (F - F_T) - r (cos sin x + jvp_cs)                        sCM (arXiv
                                                                               2410.11081)

    `jvp_cs` = cos sin dF/dtau, the JVP in the rearranged direction (cos sin F_T, cos sin); r =
    `warmup` in [0, 1]. At r = 1 the three agree. `ValueError` as `rf_tangent`; `ConfigError` on
    another variant.
    """
    _check(warmup, F_student=F_student, F_teacher=F_teacher, jvp_cs=jvp_cs, x_tau=x_tau)
    if variant not in ("paper", "release", "original"):
        raise ConfigError(
            f"sCM tangent variant {variant!r} is unknown; choose from paper, release, original"
        )
    cos, sin = torch.cos(tau), torch.sin(tau)
    weight = cos * cos if variant == "original" else cos * torch.sqrt(1 - (warmup * sin) ** 2)
    jvp_weight = 1.0 if variant == "release" else warmup
    pull = scale_per_frame(weight, (F_student - F_teacher).detach())
    return (
        -pull - warmup * scale_per_frame(cos * sin, x_tau.detach()) - jvp_weight * jvp_cs.detach()
    )


def normalise(g: torch.Tensor, c: float = 0.1) -> torch.Tensor:
    """g / (||g|| + c) with one Euclidean norm per sample, over all of [C, T, H, W].

    Computed in float64, returned in the dtype of g (at least float32). The papers print ||g||^2 +
    c; the original sCM and every public code path use the norm itself (decision A1). A NaN anywhere
    in a sample makes all of the sample NaN.
    """
    require_videos(g=g)
    wide = g.detach().double()
    norm = wide.flatten(1).norm(dim=1).view(-1, *[1] * (g.dim() - 1))
    return (wide / (norm + c)).to(torch.promote_types(g.dtype, torch.float32))


def scm_regression(
    pred: torch.Tensor,
    g_hat: torch.Tensor,
    *,
    loss_scale: float = 100.0,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "scm",
) -> LossTerm:
    """loss_scale * sum (pred - sg[pred] - g_hat)^2 per sample, mean over the batch (Causal_rCM.md
    sections 5, 8).

    `pred` is the student's F or v, with graph; `g_hat` the normalised tangent. The gradient with
    respect to `pred` is -2 loss_scale g_hat / B, of norm at most 2 loss_scale per sample before the
    batch mean. Logs: the norm of g_hat (near 1 when ||g|| >> c) and the number of non-finite
    samples. `ValueError` on unequal shapes.
    """
    require_videos(pred=pred, g_hat=g_hat)
    (pred, g_hat), bad = screen_samples(nonfinite, pred, g_hat.detach())
    per_sample = sample_sum((pred - pred.detach() - g_hat) ** 2)
    logs = {
        f"{name}/g_hat_norm": sample_sum(g_hat**2).sqrt().mean(),
        f"{name}/nonfinite_samples": bad,
    }
    return LossTerm(name, loss_scale * per_sample.mean(), logs)


def _check(warmup: float, **tensors: torch.Tensor) -> None:
    if not 0 <= warmup <= 1:
        raise ValueError(
            f"tangent warm-up ratio is {warmup}, expected a number in [0, 1] (see warmup_ratio)"
        )
    require_videos(**tensors)
