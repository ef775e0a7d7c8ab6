import math

import pytest
import torch

from rcm.diffusion import interpolant as I
from rcm.diffusion.time import per_frame
from rcm.diffusion.wan_as_trigflow import rf_point, trig_F
from tests.support.linear_gaussian import LinearGaussian

F64 = torch.float64
N = 3


def _setup(columns=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(N, N, N, N, N, generator=g, dtype=F64) for _ in range(2))
    return x, v, 0.05 + 1.45 * torch.rand(N, columns, generator=g, dtype=F64)


@pytest.mark.parametrize("columns", [1, N])
def test_equals_the_division_form(columns):
    """The coefficients of docs/reference/objectives.md#wrapper: x0 = c_skip x + c_out v, F = (cos x
    - x0) / sin.
    """
    x_tau, v, tau = _setup(columns)
    cos, sin = torch.cos(per_frame(tau, x_tau)), torch.sin(per_frame(tau, x_tau))
    z = cos + sin
    x0 = x_tau / z - sin / z * v
    x_t, t = rf_point(x_tau, tau)
    torch.testing.assert_close(x_t, x_tau / z, rtol=1e-14, atol=0)
    torch.testing.assert_close(per_frame(t, x_t), (sin / z).expand(N, 1, columns, 1, 1), rtol=1e-14, atol=0)
    F = trig_F(x_t, v, tau)
    torch.testing.assert_close(F, (cos * x_tau - x0) / sin, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(I.trig_x0(x_tau, F, tau), I.rf_x0(x_t, v, t), rtol=1e-12, atol=1e-13)


def test_true_velocities_correspond():
    """For one pair (x0, eps), the RF velocity must become the TrigFlow velocity of the same
    pair.
    """
    x0, eps, tau = _setup()
    x_t, t = rf_point(I.trig_noise(x0, eps, tau), tau)
    torch.testing.assert_close(x_t, I.rf_noise(x0, eps, t), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(trig_F(x_t, eps - x0, tau), I.trig_velocity(x0, eps, tau), rtol=1e-12, atol=1e-13)


def test_linear_gaussian_fields_correspond():
    x_tau, _, tau = _setup()
    world = LinearGaussian()
    x_t, t = rf_point(x_tau, tau)
    F = trig_F(x_t, world.rf_velocity(x_t, per_frame(t, x_t)), tau)
    torch.testing.assert_close(F, world.trig_velocity(x_tau, per_frame(tau, x_tau)), rtol=1e-12, atol=1e-12)
    same = world.rf_consistency(x_t, per_frame(t, x_t))
    torch.testing.assert_close(same, world.trig_consistency(x_tau, per_frame(tau, x_tau)), rtol=1e-12, atol=1e-12)


def test_ends_are_finite():
    x, v, _ = _setup()
    for dtype in (torch.float32, F64):
        x_, v_ = x.to(dtype), v.to(dtype)
        zero, top = torch.zeros(N, 1, dtype=dtype), torch.full((N, 1), math.pi / 2, dtype=dtype)
        assert torch.equal(trig_F(rf_point(x_, zero)[0], v_, zero), x_ + v_)
        torch.testing.assert_close(trig_F(rf_point(x_, top)[0], v_, top), v_ - x_, rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("tau", [1e-7, 1e-4, 1e-3, 0.1, 1.0, 1.5, math.pi / 2 - 1e-6])
def test_float32_is_good_to_its_precision_everywhere(tau):
    """The division form loses three digits at 1e-3; the closed form loses none."""
    x, v, _ = _setup()
    tau = torch.full((N, 1), tau, dtype=F64)
    exact = trig_F(rf_point(x, tau)[0], v, tau)
    single = trig_F(rf_point(x.float(), tau)[0], v.float(), tau)
    assert single.dtype == torch.float32
    assert (single - exact).norm() / exact.norm() < 2e-7
    only_float32 = trig_F(rf_point(x.float(), tau.float())[0], v.float(), tau.float())
    assert (only_float32 - exact).norm() / exact.norm() < 1e-6
