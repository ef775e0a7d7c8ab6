"""A rectified-flow network seen as a TrigFlow denoiser, without dividing by sin(tau)
(docs/reference/objectives.md#wrapper; Causal-rCM eq. 23-25, 29-37).

With Z = cos + sin: x_t = x_tau / Z and t = sin / Z are what the network is asked about, and the two
data predictions agree, cos x_tau - sin F = x_t - t v. Solving for F,

    F = (cos - sin) x_t + v / Z        from (cos x_tau - x_t + t v) / sin, using cos Z - 1 = sin
                                       (cos - sin)

is finite on the whole interval [0, pi/2]. Latents [B, C, T, H, W], tau [B, 1] or [B, T] float64;
`ValueError` on other time shapes and for latents of unequal shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.diffusion.interpolant import scale_per_frame
from rcm.diffusion.time import require_same_shape, trig_to_rf


def rf_point(x_tau: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, t) = (x_tau, sin) / (cos + sin): the RF sample and its RF time."""
    return scale_per_frame(1 / (torch.cos(tau) + torch.sin(tau)), x_tau), trig_to_rf(tau)


def trig_F(x_t: Tensor, v: Tensor, tau: Tensor) -> Tensor:
    """F = (cos - sin) x_t + v / (cos + sin) from a velocity at an RF sample and its RF time.

    `x_t` is the RF sample (of `rf_point`), not x_tau. Derivatives pass through.
    """
    require_same_shape(x_t=x_t, v=v)
    cos, sin = torch.cos(tau), torch.sin(tau)
    return scale_per_frame(cos - sin, x_t) + scale_per_frame(1 / (cos + sin), v)
