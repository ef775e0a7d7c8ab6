"""Derivative of a network along a path of its own input, by exact forward mode or by differences;
one call for all (Causal_rCM.md section 8, docs/reference/objectives.md#differences).

Wanted is `scale * d/dt fn(x(t), t)` with dx/dt = `velocity`: the tangent of consistency training
when `velocity` is the teacher's. `scale` [B, 1] or [B, T] (None: 1) multiplies the direction before
the network sees it in the exact scheme, which keeps tangents small in low precision; TrigFlow uses
cos(tau) sin(tau), rectified flow uses 1.

Choose the object: `Exact()`, `SemiContinuous(geometry)` (exact in x, difference in t) or
`Discrete(geometry)` (difference in both; no forward mode at all). A geometry knows how to step back
by h along a straight line (`RFStep`) or a circle (`TrigStep`). Differences are first order in h and
need a timestep precision that resolves h. They move the time of every frame and scale afterwards,
so they fit inputs on one path and take `scale` [B, 1] only; a packed clean-and-noisy input, whose
clean half must stand still, needs `Exact` with a `scale` that is 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.diffusion.interpolant import scale_per_frame
from rcm.diffusion.time import require_same_shape

Field = Callable[[Tensor, Tensor], Tensor]


class Directional(Protocol):
    """Common signature: field fn(x [B, C, T, H, W], t [B, 1] or [B, T]) -> same shape as x; returns
    scale * derivative, no graph.
    """

    def __call__(
        self, fn: Field, x: Tensor, t: Tensor, *, velocity: Tensor, scale: Tensor | None = None
    ) -> Tensor: ...


class Geometry(Protocol):
    """A backward step of size h, and the derivative from two values of a field h apart."""

    def back(self, x: Tensor, velocity: Tensor, h: float) -> Tensor:
        """The sample at t - h."""

    def slope(self, now: Tensor, before: Tensor, h: float) -> Tensor:
        """Derivative from the field at t (`now`) and at t - h (`before`), error O(h)."""


@dataclass(frozen=True)
class RFStep:
    """Straight line."""

    def back(self, x: Tensor, velocity: Tensor, h: float) -> Tensor:
        """x - h velocity."""
        return x - h * velocity

    def slope(self, now: Tensor, before: Tensor, h: float) -> Tensor:
        """(now - before) / h."""
        return (now - before) / h


@dataclass(frozen=True)
class TrigStep:
    """Rotation: exact when x and F belong to one pair (x0, eps)."""

    def back(self, x: Tensor, velocity: Tensor, h: float) -> Tensor:
        """cos(h) x - sin(h) velocity."""
        return math.cos(h) * x - math.sin(h) * velocity

    def slope(self, now: Tensor, before: Tensor, h: float) -> Tensor:
        """(cos(h) now - before) / sin(h)."""
        return (math.cos(h) * now - before) / math.sin(h)


@dataclass(frozen=True)
class Exact:
    """Forward-mode derivative: one dual pass (`fd_type` 0)."""

    def __call__(
        self, fn: Field, x: Tensor, t: Tensor, *, velocity: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """jvp of fn in the direction (scale velocity, scale)."""
        t_dot = torch.ones_like(t) if scale is None else scale.to(t.dtype).expand_as(t).contiguous()
        return jvp(fn, (x, t), (_scaled(velocity, scale).to(x.dtype), t_dot))[1]


@dataclass(frozen=True)
class _Difference:
    geometry: Geometry
    h: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.h < 1:
            raise ConfigError(f"fd_size={self.h} must lie strictly between 0 and 1 (release: 1e-4)")


class SemiContinuous(_Difference):
    """Exact in x with t held, plus a difference in t with x held (`fd_type` 1)."""

    def __call__(
        self, fn: Field, x: Tensor, t: Tensor, *, velocity: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """One dual pass and one plain pass at t - h; `ValueError` if `scale` differs between
        frames.
        """
        _require_shared(scale)
        now, moved = jvp(fn, (x, t), (_scaled(velocity, scale).to(x.dtype), None))
        with torch.no_grad():
            before = fn(x, t - self.h)
        return moved + _scaled(self.geometry.slope(now, before, self.h), scale)


class Discrete(_Difference):
    """Difference of two plain passes along the path (`fd_type` 2)."""

    def __call__(
        self, fn: Field, x: Tensor, t: Tensor, *, velocity: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Plain passes at (x, t) and one step back, without a graph; `ValueError` if `scale`
        differs between frames.
        """
        _require_shared(scale)
        require_same_shape(x=x, velocity=velocity)
        with torch.no_grad():
            now = fn(x, t)
            before = fn(self.geometry.back(x, velocity, self.h), t - self.h)
            return _scaled(self.geometry.slope(now, before, self.h), scale)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale_per_frame(scale, x)


def _require_shared(scale: Tensor | None) -> None:
    if scale is not None and (scale.dim() != 2 or scale.shape[1] != 1):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, finite differences need one per sample, [B, 1];"
            " a scale per frame needs Exact"
        )
