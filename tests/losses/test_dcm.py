from itertools import pairwise

import pytest
import torch

from rcm.diffusion import interpolant as I
from rcm.diffusion.time import per_frame, rf_to_trig
from rcm.diffusion.time_sampling import ConsistencyGrid
from rcm.losses.dcm import bidirectional_dcm, causal_dcm
from tests.support.linear_gaussian import LinearGaussian

F64 = torch.float64
SHAPE = (2, 3, 4, 5, 6)


def _pair(seed=0, shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=F64, requires_grad=True), torch.randn(shape, generator=g, dtype=F64, requires_grad=True)


def test_bidirectional_is_a_plain_sum():
    student, target = _pair()
    term = bidirectional_dcm(student, target)
    expected = 100 * sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), target.flatten().tolist(), strict=True)) / 2
    assert term.value.item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(term.value, student)
    torch.testing.assert_close(grad, 200 * (student - target).detach() / 2)


def test_causal_is_a_sum_over_frames_of_means():
    student, target = _pair()
    term = causal_dcm(student, target)
    d2 = (student - target).detach() ** 2
    expected = sum(100 * d2[b, :, f].mean().item() for b in range(2) for f in range(4)) / 2
    assert term.value.item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(term.value, student)
    torch.testing.assert_close(grad, 200 * (student - target).detach() / (2 * 3 * 5 * 6))
    assert causal_dcm(student, target, loss_scale=1.0).value.item() == pytest.approx(expected / 100, rel=1e-12)


@pytest.mark.parametrize("loss", [bidirectional_dcm, causal_dcm])
def test_the_target_is_a_constant(loss):
    student, target = _pair()
    loss(student, target).value.backward()
    assert target.grad is None and student.grad is not None


@pytest.mark.parametrize("loss", [bidirectional_dcm, causal_dcm])
def test_nonfinite(loss):
    student, target = _pair()
    target = target.detach().clone()
    target[0, 0, 0, 0, 0] = float("inf")
    name = loss(student, target).name
    assert not loss(student, target).value.isfinite()
    quiet = loss(student, target, nonfinite="zero_sample")
    quiet.value.backward()
    assert quiet.logs[f"{name}/nonfinite_samples"] == 1
    assert (student.grad[0] == 0).all() and (student.grad[1] != 0).all()


@pytest.mark.parametrize("loss", [bidirectional_dcm, causal_dcm])
def test_shapes(loss):
    student, target = _pair()
    with pytest.raises(ValueError, match="x0_target"):
        loss(student, target[:, :, :1])


@pytest.mark.parametrize("form", ["rf", "trig"])
def test_true_map_leaves_a_second_order_residual(form):
    """Fixed point (docs/reference/objectives.md#fixed-points): teacher step by Euler, student =
    target = the exact consistency map; halving du quarters the residual.
    """
    world = LinearGaussian()
    g = torch.Generator().manual_seed(2)
    n = 3
    x0 = world.mu + world.s * torch.randn(n, n, n, n, n, generator=g, dtype=F64)
    eps = torch.randn(n, n, n, n, n, generator=g, dtype=F64)
    u = torch.tensor([[0.2], [0.4], [0.6]], dtype=F64)
    residuals, loss_values = [], []
    for num_steps in (96, 192, 384):
        times = ConsistencyGrid(num_steps, 1, 3.0 if form == "rf" else 5.0).times(u)
        if form == "trig":
            times = rf_to_trig(times)
        now, later = times[:, :1], times[:, 1:]
        x = getattr(I, f"{form}_noise")(x0, eps, now)
        consistency, velocity = getattr(world, f"{form}_consistency"), getattr(world, f"{form}_velocity")
        stepped = getattr(I, f"{form}_euler")(x, velocity(x, per_frame(now, x)), now, later)
        student, target = consistency(x, per_frame(now, x)), consistency(stepped, per_frame(later, x))
        residuals.append((student - target).norm().item())
        loss_values.append(bidirectional_dcm(student, target).value.item())
    for coarse, fine in pairwise(residuals):
        assert 3.7 < coarse / fine < 4.3
    assert loss_values[0] / loss_values[1] == pytest.approx((residuals[0] / residuals[1]) ** 2, rel=1e-9)
    assert loss_values[-1] < 1e-4


def test_oracle_consistency_map_is_constant_along_the_flow():
    """The oracle against its own definition: df/dt = 0 along the velocity, f(x, 0) = x, and the
    velocity is a conditional mean.
    """
    world = LinearGaussian()
    g = torch.Generator().manual_seed(3)
    z0, z1 = (torch.randn(200_000, generator=g, dtype=F64) for _ in range(2))
    x0, eps = world.mu + world.s * z0, z1
    for form, a, b in (("rf", 0.4, 0.6), ("trig", 0.8, 0.6)):
        t = torch.tensor(0.6 if form == "rf" else torch.asin(torch.tensor(0.6, dtype=F64)).item(), dtype=F64)
        x = a * x0 + b * eps
        f, V = getattr(world, f"{form}_consistency"), getattr(world, f"{form}_velocity")
        _, slope = torch.func.jvp(f, (x, t), (V(x, t), torch.ones_like(t)))
        assert slope.abs().max() < 1e-12
        assert (f(x, 0 * t) - x).abs().max() < 1e-14
        target = eps - x0 if form == "rf" else a * eps - b * x0
        error = target - V(x, t)  # orthogonal to every function of x, here 1 and x
        assert error.mean().abs() < 0.01 and (error * x).mean().abs() < 0.01
