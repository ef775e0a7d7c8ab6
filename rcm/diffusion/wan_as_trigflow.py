"""A rectified-flow network seen as a TrigFlow denoiser, without dividing by sin(tau)
(docs/reference/objectives.md#wrapper; Causal-rCM eq. 23-25, 29-37).

With Z = cos + sin: x_t = x_tau / Z and t = sin / Z are what the network is asked about, and the two
data predictions agree, cos x_tau - sin F = x_t - t v. Solving for F,

    F = (cos - sin) x_t + v / Z        from (cos x_tau - x_t + t v) / sin, using cos Z - 1 = sin
                                       (cos - sin)

is finite on the whole interval [0, pi/2]. Latents [B, C, T, H, W], tau [B, 1] or [B, T] float64;
`ValueError` on other time shapes.
"""

from __future__ import annotations

import torch

from rcm.diffusion.interpolant import scale_per_frame
from rcm.diffusion.time import trig_to_rf


def rf_point(x_tau: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, t): the RF sample x_tau / (cos + sin), dtype of x_tau, and its RF time sin / (cos +
    sin), dtype of tau.
    """
    return scale_per_frame(1 / (torch.cos(tau) + torch.sin(tau)), x_tau), trig_to_rf(tau)


def trig_F(x_t: torch.Tensor, v: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """TrigFlow velocity F = (cos - sin) x_t + v / (cos + sin) from an RF sample and a velocity at
    its RF time.

    `x_t` is the RF sample (first result of `rf_point`), not x_tau. Derivatives, also forward-mode,
    pass through.
    """
    cos, sin = torch.cos(tau), torch.sin(tau)
    return scale_per_frame(cos - sin, x_t) + scale_per_frame(1 / (cos + sin), v)


def trig_F_dot(
    x_t: torch.Tensor,
    v: torch.Tensor,
    *,
    v_teacher: torch.Tensor,
    jvp: torch.Tensor,
    tau: torch.Tensor,
) -> torch.Tensor:
    """dF/dtau along the teacher's path, from the RF tangent `jvp` J = d_x v . V + d_t v
    (docs/reference/objectives.md#wrapper, Causal-rCM eq. 29-37).

    dF/dtau = -Z x_t + (cos - sin) b^2 (V - v) + b^3 J with b = 1/Z; V = `v_teacher`. All latents at
    the RF point of tau. tau is [B, 1]: with a time per frame, b^2 would not factor out of a
    direction in which frames see each other. `ValueError` otherwise.
    """
    if tau.dim() != 2 or tau.shape[1] != 1:
        raise ValueError(
            f"tau has shape {tuple(tau.shape)}, expected [B, 1]: this closed form holds for one"
            " time per sample"
        )
    cos, sin = torch.cos(tau), torch.sin(tau)
    b = 1 / (cos + sin)
    return (
        scale_per_frame(-(cos + sin), x_t)
        + scale_per_frame((cos - sin) * b**2, v_teacher - v)
        + scale_per_frame(b**3, jvp)
    )
