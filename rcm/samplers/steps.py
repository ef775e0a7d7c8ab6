"""One update of a sampler: from x at time t to x at time t_next, given the velocity. Pure functions
of tensors.

All rules read x_t = (1 - t) x0 + t eps and v = eps - x0. Times are RF, Python floats (shared by the
batch).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class StepRule(Protocol):
    """x [B, C, T, H, W] at `t`, velocity of the same shape, fresh unit noise or None -> x at
    `t_next`.
    """

    needs_noise: bool
    mean: bool
    """Whether `v` is the mean velocity from `t` to `t_next`, of a model with two times, instead of
    that at `t`.
    """

    def __call__(
        self, x: Tensor, v: Tensor, *, t: float, t_next: float, noise: Tensor | None
    ) -> Tensor: ...

    def on_device(
        self, x: Tensor, v: Tensor, *, t: Tensor, t_next: Tensor, noise: Tensor
    ) -> Tensor:
        """The same with times [B, 1] in device memory, for captured steps; `noise` is read, and of
        no effect, where none is needed.
        """
        ...


class EulerStep:
    """Deterministic probability-flow step x - (t - t_next) v."""

    needs_noise = False
    mean = False

    def __call__(
        self, x: Tensor, v: Tensor, *, t: float, t_next: float, noise: Tensor | None = None
    ) -> Tensor:
        return x - (t - t_next) * v

    def on_device(
        self, x: Tensor, v: Tensor, *, t: Tensor, t_next: Tensor, noise: Tensor
    ) -> Tensor:
        """See `StepRule`."""
        return x - _over(t - t_next, x) * v


class FlowMapStep(EulerStep):
    """The jump of a flow map along the probability flow, x - (t - t_next) u(x, t, t_next): the
    Euler step with the mean velocity, exact for an exact one (arXiv 2505.13447). Nothing is
    renoised.
    """

    mean = True


class ConsistencyStep:
    """Multistep consistency sampling: jump to x0 = x - t v, then renoise to t_next with fresh
    noise. At t_next = 0 it is the clean prediction.
    """

    needs_noise = True
    mean = False

    def __call__(
        self, x: Tensor, v: Tensor, *, t: float, t_next: float, noise: Tensor | None
    ) -> Tensor:
        x0 = x - t * v
        if t_next == 0.0:
            return x0
        if noise is None:
            raise ValueError(
                f"renoising to t={t_next:g} needs a noise tensor of shape {tuple(x.shape)}, got"
                " None"
            )
        return (1.0 - t_next) * x0 + t_next * noise

    def on_device(
        self, x: Tensor, v: Tensor, *, t: Tensor, t_next: Tensor, noise: Tensor
    ) -> Tensor:
        """See `StepRule`."""
        return _over(1.0 - t_next, x) * (x - _over(t, x) * v) + _over(t_next, x) * noise


def _over(t: Tensor, x: Tensor) -> Tensor:
    """Times [B, 1] over `x` [B, C, T, H, W]."""
    return t.reshape(-1, *[1] * (x.dim() - 1))
