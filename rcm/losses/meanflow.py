"""MeanFlow (arXiv 2505.13447): the residual of a student that predicts mean velocities.

u(x_t, t, s) is the mean of the velocity V along its ODE between t and an earlier s, x_s = x_t - (t
- s) u. Differentiating (t - s) u along the ODE gives the identity that the student is held to (eq.
6),

    u = V - (t - s) du/dt,    du/dt = J = d_x u . V + d_t u at a fixed s,

with the right side a constant (eq. 9-10). At s = t it is the regression on V, at s = 0 the tangent
of TF-sCM (`rf_tangent`) with factor 1: there u is the velocity v of the consistency function x - t
v.

A sample's squared residual is weighted by 1 / (||u - u_tgt|| + c), the paper's adaptive weight
(section 4.3) at p = 1/2 in the form of `scm.normalise`: that and `scm.scm_regression` make the loss
of the residual. Latents [B, C, T, H, W]; times [B, 1] or [B, T], float64, s <= t.
"""

from __future__ import annotations

import torch

from rcm.losses.scm import rf_tangent


def meanflow_residual(
    u_student: torch.Tensor,
    v_teacher: torch.Tensor,
    jvp: torch.Tensor,
    t_rf: torch.Tensor,
    s_rf: torch.Tensor,
    *,
    warmup: float = 1.0,
) -> torch.Tensor:
    """u_tgt - u = V - u - r (t - s) J, without graph; `warmup` r in [0, 1] as in TF-sCM.
    `ValueError` as `rf_tangent`.
    """
    return rf_tangent(u_student, v_teacher, jvp, t_rf - s_rf, warmup=warmup)
