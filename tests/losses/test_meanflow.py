"""The MeanFlow residual: the identity against quadrature, and its two ends."""

import pytest
import torch
from numpy.polynomial.legendre import leggauss

from rcm.diffusion.time import per_frame
from rcm.losses.meanflow import meanflow_residual
from rcm.losses.scm import rf_tangent
from tests.support.linear_gaussian import LinearGaussian

WORLD = LinearGaussian()
F64 = torch.float64
SHAPE = (3, 2, 4, 2, 2)


def parts(columns: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, t and an earlier s."""
    g = torch.Generator().manual_seed(seed)
    t = 0.1 + 0.9 * torch.rand(SHAPE[0], columns, generator=g, dtype=F64)
    return torch.randn(SHAPE, generator=g, dtype=F64), t, t * torch.rand(SHAPE[0], columns, generator=g, dtype=F64)


def quadrature(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, *, nodes: int = 60) -> torch.Tensor:
    """The mean of the velocity over the times from s to t, along the exact trajectory through x at
    t.
    """
    t, s, total = per_frame(t, x), per_frame(s, x), torch.zeros_like(x)
    for node, weight in zip(*leggauss(nodes), strict=True):
        tau = (t + s) / 2 + (t - s) / 2 * node
        total += weight / 2 * WORLD.rf_velocity(WORLD.rf_flow_map(x, t, tau), tau)
    return total


@pytest.mark.parametrize("columns", [1, SHAPE[2]])
def test_the_identity_holds_for_the_mean_of_the_velocity(columns):
    """By quadrature, in value and in its derivative along the ODE; no closed form of u is used."""
    x, t, s = parts(columns)
    v = WORLD.rf_velocity(x, per_frame(t, x))
    u, u_dot = torch.func.jvp(lambda x, t: quadrature(x, t, s), (x, t), (v, torch.ones_like(t)))
    assert meanflow_residual(u, v, u_dot, t, s).abs().max() < 1e-9
    assert meanflow_residual(u + 0.1, v, u_dot, t, s).abs().max() > 0.09
    closed = WORLD.rf_mean_velocity(x, per_frame(t, x), per_frame(s, x))
    torch.testing.assert_close(closed, u, rtol=1e-9, atol=1e-9)


def test_at_equal_times_it_is_the_regression_on_the_velocity():
    x, t, _ = parts(1)
    u, v, j = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert torch.equal(meanflow_residual(u, v, j, t, t), v - u)


@pytest.mark.parametrize("warmup", [1.0, 0.3])
def test_down_to_the_data_it_is_the_tangent_of_tf_scm(warmup):
    """Factor 1, and only the warm-up's share of the derivative."""
    x, t, _ = parts(1)
    u, v, j = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=F64)
    zero = torch.zeros_like(t)
    assert torch.equal(meanflow_residual(u, v, j, t, zero, warmup=warmup), rf_tangent(u, v, j, t, warmup=warmup))
    torch.testing.assert_close(WORLD.rf_mean_velocity(x, per_frame(t, x), per_frame(zero, x)), WORLD.rf_student(x, per_frame(t, x)))


def test_the_residual_carries_no_graph():
    _, t, s = parts(1)
    u = torch.randn(SHAPE, dtype=F64, requires_grad=True)
    assert not meanflow_residual(u, u, u, t, s).requires_grad
