"""UniPC: a multistep predictor-corrector for x0-predicting samplers (arXiv 2302.04867), on the
rectified-flow path.

With alpha = 1 - t, sigma = t and lambda = log(alpha / sigma), the data form of the probability flow
is, for h = lambda_t - lambda_s,

    x_t = (sigma_t / sigma_s) x_s + alpha_t h * integral_0^1 e^{-(1 - r) h} x0(lambda_s + r h) dr.

Constant x0 gives the first-order step with weight alpha_t (1 - e^{-h}). Differences D_m =
x0(lambda_s + r_m h) - x0(lambda_s) add alpha_t B(h) sum_m (a_m / r_m) D_m, B(h) = 1 - e^{-h} (the
paper's B_2, "bh2"), with a from the order conditions

    sum_m r_m^{k-1} a_m = k! phi_{k+1}(-h) / phi_1(-h),  k = 1 .. number of differences.

The predictor uses differences to earlier evaluations (r < 0), the corrector also the one at its own
end (r = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.diffusion.time import require_same_shape
from rcm.samplers.bidirectional import Velocity

SINGLE_WEIGHT = 0.5
"""a of a single difference: the paper's choice, the limit of the order condition for h -> 0."""


@dataclass(frozen=True)
class _Evaluation:
    """A predicted x0 and the lambda where it was predicted."""

    x0: Tensor
    log_snr: float


@dataclass(frozen=True)
class UniPC:
    """Sampler along `times` (RF, decreasing from below 1 to 0): `order` 1 to 3, lower over the
    first and the last steps.

    One network evaluation per step; the corrector reuses it. The start is the unscaled noise.
    Raises `ConfigError` for an impossible grid or order. Source: arXiv 2302.04867, algorithms 1, 2
    and appendix; order 2 is what Wan is sampled with (docs/reference/sampling.md#many-steps).
    """

    times: tuple[float, ...]
    order: int = 2

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 1 <= self.order <= 3:
            raise ConfigError(f"UniPC order must be 1, 2 or 3, got {self.order}")
        if len(self.times) < 2 or self.times[0] >= 1 or self.times[-1] != 0:
            raise ConfigError(
                "UniPC walks times from below 1 to exactly 0 (its log signal-to-noise ratio is"
                f" infinite at 1), got {self.times[:1]} ... {self.times[-1:]}; lower sigma_max"
            )
        if any(a <= b for a, b in pairwise(self.times)):
            raise ConfigError("UniPC times must decrease strictly")

    def sample(
        self, velocity: Velocity, noise: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `Sampler`. Deterministic: `generator` is not used."""
        x, last_x, last_order = noise, noise, 0
        history: list[_Evaluation] = []
        steps = len(self.times) - 1
        for i, (t, t_next) in enumerate(zip(self.times[:-1], self.times[1:], strict=True)):
            v = velocity(x, t)
            require_same_shape(x=x, velocity=v)
            now = _Evaluation(x - t * v, _log_snr(t))
            if history:
                x = _step(last_x, history, last_order, t_from=self.times[i - 1], t_to=t, end=now)
            history = [*history, now][-self.order :]
            last_order = min(self.order, len(history), steps - i)
            last_x = x
            x = _step(x, history, last_order, t_from=t, t_to=t_next)
        return x


def _step(
    x: Tensor,
    history: list[_Evaluation],
    order: int,
    *,
    t_from: float,
    t_to: float,
    end: _Evaluation | None = None,
) -> Tensor:
    """From `x` at `t_from` to `t_to`: the predictor of `order`, or with the evaluation at the `end`
    the corrector of that order.
    """
    start = history[-1]
    h = _log_snr(t_to) - start.log_snr
    others = history[-order:-1] + ([] if end is None else [end])
    increment = start.x0
    if others:
        ratios = [(other.log_snr - start.log_snr) / h for other in others]
        for a, r, other in zip(_weights(ratios, h), ratios, others, strict=True):
            increment = increment + (a / r) * (other.x0 - start.x0)
    return (t_to / t_from) * x + ((1 - t_to) * -math.expm1(-h)) * increment


def _weights(ratios: list[float], h: float) -> list[float]:
    """Solution a of the order conditions for differences at `ratios`."""
    if len(ratios) == 1:
        return [SINGLE_WEIGHT]
    r = torch.tensor(ratios, dtype=torch.float64)
    count = len(ratios)
    rows = torch.stack([r**k for k in range(count)])
    right = [math.factorial(k) * _phi(k + 1, -h) / _phi(1, -h) for k in range(1, count + 1)]
    return torch.linalg.solve(rows, torch.tensor(right, dtype=torch.float64)).tolist()


def _phi(k: int, z: float) -> float:
    """phi_k(z) = sum_j z^j / (j + k)!; for large |z| by phi_{k+1} = (phi_k - 1/k!) / z from phi_0 =
    e^z, which cancels for small ones.
    """
    if abs(z) < 1:
        return sum(z**j / math.factorial(j + k) for j in range(18))
    value = math.exp(z)
    for n in range(k):
        value = (value - 1 / math.factorial(n)) / z
    return value


def _log_snr(t: float) -> float:
    """lambda = log((1 - t) / t), infinite at t = 0."""
    return math.inf if t == 0 else math.log1p(-t) - math.log(t)
