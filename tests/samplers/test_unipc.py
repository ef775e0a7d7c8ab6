"""UniPC by itself: order of convergence against a field with a known solution, weights by
quadrature, what it refuses.
"""

from __future__ import annotations

import math

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.samplers.bidirectional import SingleStep
from rcm.samplers.schedule import shifted_grid, trig_grid
from rcm.samplers.steps import ConsistencyStep
from rcm.samplers.unipc import UniPC, _phi, _weights

MEAN, STD = 0.7, 0.4


def gaussian_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """v = E[eps - x0 | x] for data N(MEAN, STD^2): the flow keeps quantiles, so its end is
    known.
    """
    variance = (1 - t) ** 2 * STD**2 + t**2
    slope = (t - (1 - t) * STD**2) / variance
    return slope * (x - (1 - t) * MEAN) - MEAN


def error_at_five_percent(steps: int, order: int) -> float:
    """Error of the state that is evaluated at t = 0.05, the last but one of an even grid."""
    times = tuple(0.95 - 0.9 * k / steps for k in range(steps + 1))
    seen = {}

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen[t] = x.item()
        return gaussian_velocity(x, t)

    UniPC((*times, 0.0), order=order).sample(velocity, torch.full((1, 1, 1, 1, 1), 1.1, dtype=torch.float64))

    def spread(t: float) -> float:
        return math.hypot((1 - t) * STD, t)

    quantile = (1.1 - (1 - times[0]) * MEAN) / spread(times[0])
    return abs(seen[times[-1]] - (1 - times[-1]) * MEAN - quantile * spread(times[-1]))


@pytest.mark.parametrize(("order", "rate"), [(1, 1.9), (2, 2.85)])
def test_the_corrector_adds_an_order(order, rate):
    """The paper's claim: UniPC of order p converges with order p + 1."""
    assert math.log2(error_at_five_percent(80, order) / error_at_five_percent(160, order)) > rate


@pytest.mark.parametrize("h", [0.01, 0.7, 3.0])
def test_weights_satisfy_their_integrals(h):
    """phi_{k+1}(-h) = integral of e^{-(1-r)h} r^k / k!, and the weights reproduce polynomials of
    degree one and two.
    """
    r = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    kernel = torch.exp(-(1 - r) * h)
    for k in range(3):
        assert _phi(k + 1, -h) == pytest.approx((kernel * r**k).mean().item() / math.factorial(k), rel=1e-7)
    ratios = [-0.8, 1.0]
    a = _weights(ratios, h)
    for k in (1, 2):
        got = sum(w / q * q**k for w, q in zip(a, ratios, strict=True)) * -math.expm1(-h)
        assert got == pytest.approx(h * (kernel * r**k).mean().item(), rel=1e-6)


def test_each_time_is_evaluated_once_in_order():
    seen = []
    times = shifted_grid(6, shift=5.0, sigma_max=5000)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return -x

    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    assert UniPC(times).sample(velocity, x).dtype is torch.float64
    assert tuple(seen) == times[:-1]


@pytest.mark.parametrize(
    ("times", "order"), [((1.0, 0.5, 0.0), 2), ((0.9, 0.5), 2), ((0.0,), 2), ((0.9, 0.5, 0.6, 0.0), 2), ((0.9, 0.0), 4), ((0.9, 0.0), 0)]
)
def test_impossible_grids(times, order):
    with pytest.raises(ConfigError, match="UniPC"):
        UniPC(times, order=order)


def test_noise_is_drawn_at_every_consistency_step():
    """A generator used for a second video is where the release's would be: one draw per step, the
    last one included.
    """
    times = trig_grid(3, sigma_max=80)
    shape = (1, 2, 1, 2, 2)
    used, kept = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    x = torch.ones(shape, dtype=torch.float64)
    got = SingleStep(times, ConsistencyStep(), scale_first=True).sample(lambda x, t: 0.1 * x, x, generator=used)
    draws = [torch.randn(shape, generator=kept).double() for _ in range(3)]
    x = x * times[0]
    for t, t_next, n in zip(times[:-1], times[1:], draws, strict=True):
        x = (1 - t_next) * (x - t * 0.1 * x) + t_next * n
    torch.testing.assert_close(got, x)
    assert torch.equal(torch.randn(4, generator=used), torch.randn(4, generator=kept))
