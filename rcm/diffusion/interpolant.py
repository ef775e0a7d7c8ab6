"""The two noising paths and conversions between predictions (Causal_rCM.md sections 1, 6;
Causal-rCM appendix A).

                 rectified flow (RF), t in [0, 1]      TrigFlow, tau in [0, pi/2], sigma_data = 1
    path         x = (1 - t) x0 + t eps                x = cos x0 + sin eps
    velocity     v = eps - x0                          F = cos eps - sin x0
    data         x0 = x - t v                          x0 = cos x - sin F
    noise        eps = x + (1 - t) v                   eps = sin x + cos F

Latents are [B, C, T, H, W]; times [B, 1] or [B, T], float64 (float32 accepted). Coefficients are
computed in the dtype of the time and then cast to the latents' dtype (at least float32), so float64
times do not drag latents to float64. `ValueError` on any other time shape and for latents of
unequal shape, `TypeError` for times of lower precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.diffusion.time import per_frame, require_precise, require_same_shape


def rf_noise(x0: Tensor, eps: Tensor, t_rf: Tensor) -> Tensor:
    """(1 - t) x0 + t eps."""
    require_same_shape(x0=x0, eps=eps)
    return scale_per_frame(1 - t_rf, x0) + scale_per_frame(t_rf, eps)


def rf_velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x0, the derivative of the RF path, independent of time."""
    require_same_shape(x0=x0, eps=eps)
    return eps - x0


def rf_x0(x_t: Tensor, v: Tensor, t_rf: Tensor) -> Tensor:
    """x0 = x_t - t v: the consistency function f when v is the student's; equals x_t at t = 0."""
    require_same_shape(x_t=x_t, v=v)
    return x_t - scale_per_frame(t_rf, v)


def rf_euler(x_t: Tensor, v: Tensor, t_rf: Tensor, t_next: Tensor) -> Tensor:
    """Euler step of dx/dt = v from t to t_next: x_t - (t - t_next) v."""
    require_same_shape(x_t=x_t, v=v)
    return x_t - scale_per_frame(t_rf - t_next, v)


def trig_noise(x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
    """cos(tau) x0 + sin(tau) eps."""
    require_same_shape(x0=x0, eps=eps)
    return scale_per_frame(torch.cos(tau), x0) + scale_per_frame(torch.sin(tau), eps)


def trig_velocity(x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
    """F = cos(tau) eps - sin(tau) x0, the derivative of the TrigFlow path."""
    require_same_shape(x0=x0, eps=eps)
    return scale_per_frame(torch.cos(tau), eps) - scale_per_frame(torch.sin(tau), x0)


def trig_x0(x_tau: Tensor, F: Tensor, tau: Tensor) -> Tensor:
    """x0 = cos(tau) x_tau - sin(tau) F, the consistency function; x_tau at tau = 0."""
    require_same_shape(x_tau=x_tau, F=F)
    return scale_per_frame(torch.cos(tau), x_tau) - scale_per_frame(torch.sin(tau), F)


def trig_euler(x_tau: Tensor, F: Tensor, tau: Tensor, tau_next: Tensor) -> Tensor:
    """Euler step of dx/dtau = F, not the exact rotation: x_tau - (tau - tau_next) F."""
    require_same_shape(x_tau=x_tau, F=F)
    return x_tau - scale_per_frame(tau - tau_next, F)


def scale_per_frame(coefficient: Tensor, x: Tensor) -> Tensor:
    """coefficient [B, 1] or [B, T] times x [B, C, T, H, W], in the dtype of x or float32."""
    require_precise("time", coefficient)
    return per_frame(coefficient, x).to(torch.promote_types(x.dtype, torch.float32)) * x
