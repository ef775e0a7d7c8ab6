"""Time parameterisations and the maps between them (Causal_rCM.md section 1; Causal-rCM appendix
A).

    t_rf in [0, 1]      rectified-flow time, x = (1 - t) x0 + t eps; 1 is noise
    tau  in [0, pi/2]   TrigFlow time, x = cos(tau) x0 + sin(tau) eps; pi/2 is noise
    sigma in [0, inf)   noise-to-data ratio, sigma = t / (1 - t) = tan(tau)
    timestep in [0, 1000]   what a Wan network is told, 1000 t_rf

All maps are elementwise, keep shape and dtype, are differentiable inside their domain, and read no
values on the host: an argument outside its domain is the caller's error. Give float64; float32 is
accepted, lower precision raises `TypeError`.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from rcm.core.errors import ConfigError

TIMESTEP_SCALE = 1000.0

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def rf_to_trig(t_rf: Tensor) -> Tensor:
    """tau = arctan(t / (1 - t)), written arctan2(t, 1 - t): exact at t = 1, where it is pi/2."""
    require_precise("t_rf", t_rf)
    return torch.atan2(t_rf, 1 - t_rf)


def trig_to_rf(tau: Tensor) -> Tensor:
    """t = sin(tau) / (cos(tau) + sin(tau)); dt/dtau = 1 / (cos + sin)^2."""
    require_precise("tau", tau)
    sin = torch.sin(tau)
    return sin / (torch.cos(tau) + sin)


def rf_to_timestep(t_rf: Tensor) -> Tensor:
    """timestep = 1000 t, in the dtype of t; the denoiser casts it for the network."""
    require_precise("t_rf", t_rf)
    return TIMESTEP_SCALE * t_rf


def shift_time(t: FloatOrTensor, shift: float) -> FloatOrTensor:
    """s t / (1 + (s - 1) t): multiplies sigma by s; s <= 0 changes nothing (release)."""
    return t if shift <= 0 else shift * t / (1 + (shift - 1) * t)


def check_shift(shift: float, *, knob: str = "shift") -> None:
    """`ConfigError` for a shift that rounding leaves no times of: one above 0 that is not in 0.001
    to 1000.
    """
    if not (shift <= 0 or 1e-3 <= shift <= 1e3):
        raise ConfigError(f"{knob}={shift:g} must be in 0.001 to 1000; shifts in use are 1 to 12")


def unshift_time(t: FloatOrTensor, shift: float) -> FloatOrTensor:
    """t / (s - (s - 1) t), the inverse of `shift_time`; s <= 0 changes nothing."""
    return t if shift <= 0 else t / (shift - (shift - 1) * t)


def per_frame(t: Tensor, x: Tensor) -> Tensor:
    """Time [B, 1] (per sample) or [B, T] (per frame) as a view that broadcasts over x [B, C, T, H,
    W].

    `ValueError` for other shapes: a [B] would broadcast over the width of square data unseen.
    """
    if x.dim() != 5:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, C, T, H, W]")
    batch, frames = x.shape[0], x.shape[2]
    if t.dim() != 2 or t.shape[0] != batch or t.shape[1] not in (1, frames):
        raise ValueError(
            f"time has shape {tuple(t.shape)}, expected ({batch}, 1) or ({batch}, {frames}) for x"
            f" of shape {tuple(x.shape)}"
        )
    return t[:, None, :, None, None]


def require_same_shape(**tensors: Tensor) -> None:
    """`ValueError` naming the arguments unless all tensors have one shape: a broadcast between
    samples is always a mistake.
    """
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "shapes must agree, got "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )


def require_precise(name: str, value: Tensor) -> None:
    """`TypeError` unless `value` is float64 or float32."""
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} is {value.dtype}, expected float64 (float32 accepted): lower precision merges"
            " neighbouring times"
        )
