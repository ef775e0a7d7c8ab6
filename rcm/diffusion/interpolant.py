"""The two noising paths and every conversion between predictions (Causal_rCM.md sections 1, 6;
Causal-rCM appendix A).

                 rectified flow (RF), t in [0, 1]      TrigFlow, tau in [0, pi/2], sigma_data = 1
    path         x = (1 - t) x0 + t eps                x = cos x0 + sin eps
    velocity     v = eps - x0                          F = cos eps - sin x0
    data         x0 = x - t v                          x0 = cos x - sin F
    noise        eps = x + (1 - t) v                   eps = sin x + cos F

Latents are [B, C, T, H, W]; times [B, 1] or [B, T], float64 (float32 accepted). Coefficients are
computed in the dtype of the time and then cast to the latents' dtype (at least float32), so float64
times do not drag latents to float64. `ValueError` on any other time shape.
"""

from __future__ import annotations

import torch

from rcm.diffusion.time import per_frame


def rf_noise(x0: torch.Tensor, eps: torch.Tensor, t_rf: torch.Tensor) -> torch.Tensor:
    """(1 - t) x0 + t eps."""
    return scale_per_frame(1 - t_rf, x0) + scale_per_frame(t_rf, eps)


def rf_velocity(x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """v = eps - x0, the derivative of the RF path, independent of time."""
    return eps - x0


def rf_x0(x_t: torch.Tensor, v: torch.Tensor, t_rf: torch.Tensor) -> torch.Tensor:
    """x0 = x_t - t v: the consistency function f when v is the student's; equals x_t at t = 0."""
    return x_t - scale_per_frame(t_rf, v)


def rf_eps(x_t: torch.Tensor, v: torch.Tensor, t_rf: torch.Tensor) -> torch.Tensor:
    """eps = x_t + (1 - t) v; equals x_t at t = 1."""
    return x_t + scale_per_frame(1 - t_rf, v)


def rf_v_from_x0(x_t: torch.Tensor, x0: torch.Tensor, t_rf: torch.Tensor) -> torch.Tensor:
    """v = (x_t - x0) / t for t > 0; infinite or NaN at t = 0, where the data carry no velocity."""
    return scale_per_frame(1 / t_rf, x_t - x0)


def rf_v_from_eps(x_t: torch.Tensor, eps: torch.Tensor, t_rf: torch.Tensor) -> torch.Tensor:
    """v = (eps - x_t) / (1 - t) for t < 1."""
    return scale_per_frame(1 / (1 - t_rf), eps - x_t)


def rf_euler(
    x_t: torch.Tensor, v: torch.Tensor, t_rf: torch.Tensor, t_next: torch.Tensor
) -> torch.Tensor:
    """Euler step of dx/dt = v from t to t_next: x_t - (t - t_next) v."""
    return x_t - scale_per_frame(t_rf - t_next, v)


def trig_noise(x0: torch.Tensor, eps: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """cos(tau) x0 + sin(tau) eps."""
    return scale_per_frame(torch.cos(tau), x0) + scale_per_frame(torch.sin(tau), eps)


def trig_velocity(x0: torch.Tensor, eps: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """F = cos(tau) eps - sin(tau) x0, the derivative of the TrigFlow path."""
    return scale_per_frame(torch.cos(tau), eps) - scale_per_frame(torch.sin(tau), x0)


def trig_x0(x_tau: torch.Tensor, F: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """x0 = cos(tau) x_tau - sin(tau) F: the TrigFlow consistency function; equals x_tau at tau =
    0.
    """
    return scale_per_frame(torch.cos(tau), x_tau) - scale_per_frame(torch.sin(tau), F)


def trig_eps(x_tau: torch.Tensor, F: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """eps = sin(tau) x_tau + cos(tau) F; equals x_tau at tau = pi/2."""
    return scale_per_frame(torch.sin(tau), x_tau) + scale_per_frame(torch.cos(tau), F)


def trig_F_from_x0(x_tau: torch.Tensor, x0: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """F = (cos(tau) x_tau - x0) / sin(tau) for tau > 0.

    Loses digits near 0; from a Wan velocity use `wan_as_trigflow.trig_F`, which does not divide.
    """
    return scale_per_frame(1 / torch.sin(tau), scale_per_frame(torch.cos(tau), x_tau) - x0)


def trig_euler(
    x_tau: torch.Tensor, F: torch.Tensor, tau: torch.Tensor, tau_next: torch.Tensor
) -> torch.Tensor:
    """Euler step of dx/dtau = F from tau to tau_next: x_tau - (tau - tau_next) F (first order; not
    the exact rotation).
    """
    return x_tau - scale_per_frame(tau - tau_next, F)


def scale_per_frame(coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """coefficient [B, 1] or [B, T] times x [B, C, T, H, W], in the dtype of x (at least float32);
    `ValueError` on other shapes.
    """
    return per_frame(coefficient, x).to(torch.promote_types(x.dtype, torch.float32)) * x
