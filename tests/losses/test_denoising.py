import math

import pytest
import torch

from rcm.diffusion import interpolant as I
from rcm.diffusion.time import per_frame, trig_to_rf
from rcm.diffusion.wan_as_trigflow import rf_point, trig_F
from rcm.losses.denoising import (
    bidirectional_critic_loss,
    causal_critic_loss,
    diffusion_loss,
    gaussian_bell,
    ode_pair_loss,
    pick_states,
)

F64 = torch.float64
SHAPE = (2, 3, 4, 5, 6)


def _rand(count, seed=0, shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=F64) for _ in range(count)]


def test_gaussian_bell():
    """e^{-2 (t - 1/2)^2} - e^{-1/2} (Causal_rCM.md section 3)."""
    t = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.8], dtype=F64)
    expected = [0.0, 0.0, 1 - math.exp(-0.5), math.exp(-0.125) - math.exp(-0.5), math.exp(-0.18) - math.exp(-0.5)]
    torch.testing.assert_close(gaussian_bell(t), torch.tensor(expected, dtype=F64), rtol=1e-13, atol=1e-15)
    assert gaussian_bell(t)[2].item() == pytest.approx(0.393, abs=5e-4)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("weight", [None, gaussian_bell])
def test_diffusion_loss_by_loops(columns, weight):
    v, x0, eps = _rand(3)
    v.requires_grad_()
    t = torch.rand(2, columns, generator=torch.Generator().manual_seed(1), dtype=F64)
    term = diffusion_loss(v, x0, eps, t, weight=weight)
    expected, gradient = 0.0, torch.zeros(SHAPE, dtype=F64)
    for b in range(2):
        for f in range(4):
            time = t[b, f if columns > 1 else 0]
            w = 1.0 if weight is None else (torch.exp(-2 * (time - 0.5) ** 2) - math.exp(-0.5)).item()
            diff = v[b, :, f].detach() - (eps[b, :, f] - x0[b, :, f])
            expected += 100 * w * (diff**2).mean().item() / 2
            gradient[b, :, f] = 200 * w * diff / (3 * 5 * 6) / 2
    assert term.value.item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(term.value, v)
    torch.testing.assert_close(grad, gradient, rtol=1e-12, atol=1e-14)
    assert diffusion_loss(v, x0, eps, t, weight=weight, loss_scale=1.0).value.item() == pytest.approx(expected / 100, rel=1e-12)


def test_bidirectional_critic_is_the_division_form():
    """Definition: sum (G - x0_fake)^2 / sin^2 with x0_fake from the network; also sum |F_fake -
    F_target|^2 (Causal_rCM.md section 8).
    """
    shape = (3, 3, 3, 3, 3)
    v, generated, eps = _rand(3, shape=shape)
    tau = torch.tensor([[0.2], [0.9], [1.5]], dtype=F64)
    term = bidirectional_critic_loss(v.requires_grad_(), generated, eps, tau)

    y = I.trig_noise(generated, eps, tau)
    x_t, t = rf_point(y, tau)
    x0_fake = I.rf_x0(x_t, v, t)
    division = ((generated - x0_fake) ** 2 / torch.sin(per_frame(tau, y)) ** 2).flatten(1).sum(1)
    velocity = ((trig_F(x_t, v, tau) - I.trig_velocity(generated, eps, tau)) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(term.value, division.mean(), rtol=1e-11, atol=0)
    torch.testing.assert_close(term.value, velocity.mean(), rtol=1e-11, atol=0)
    (grad,) = torch.autograd.grad(term.value, v, retain_graph=True)
    (expected,) = torch.autograd.grad(division.mean(), v)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
    assert bidirectional_critic_loss(v, generated, eps, 0 * tau).value.isfinite()


def test_causal_critic_is_a_mean_and_unweighted():
    v, generated, eps = _rand(3)
    term = causal_critic_loss(v.requires_grad_(), generated, eps)
    d = [a - (c - b) for a, b, c in zip(v.flatten().tolist(), generated.flatten().tolist(), eps.flatten().tolist(), strict=True)]
    assert term.value.item() == pytest.approx(sum(x * x for x in d) / len(d), rel=1e-12)
    (grad,) = torch.autograd.grad(term.value, v)
    torch.testing.assert_close(grad, (2 * (v - (eps - generated)) / v.numel()).detach(), rtol=1e-12, atol=1e-15)


def test_critics_differ_by_the_weight_only():
    """decision A7: bidirectional = b^2 times the sum, causal = the mean."""
    v, generated, eps = _rand(3)
    tau = torch.full((2, 1), 0.7, dtype=F64)
    b = (1 - trig_to_rf(tau)[0, 0]) / math.cos(0.7)
    size = v[0].numel()
    ratio = bidirectional_critic_loss(v, generated, eps, tau).value / causal_critic_loss(v, generated, eps).value
    assert ratio.item() == pytest.approx((b**2 * size).item(), rel=1e-12)


def test_ode_pairs_mask_clean_frames():
    student, endpoint = _rand(2)
    student.requires_grad_()
    t = torch.tensor([[0.0, 0.9, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0]], dtype=F64)
    term = ode_pair_loss(student, endpoint, t)
    d2 = (student - endpoint).detach() ** 2
    expected = d2[0][:, [1, 3]].mean().item() / 2  # sample 1 has no noisy frame and adds 0
    assert term.value.item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(term.value, student)
    assert (grad[0][:, [0, 2]] == 0).all() and (grad[1] == 0).all() and (grad[0][:, [1, 3]] != 0).all()
    half = ode_pair_loss(student, endpoint, t, loss_scale=0.5)
    assert half.value.item() == pytest.approx(expected / 2, rel=1e-12)


def test_ode_pairs_with_one_time_per_sample():
    student, endpoint = _rand(2)
    d2 = (student - endpoint) ** 2
    both = ode_pair_loss(student, endpoint, torch.tensor([[0.5], [0.7]], dtype=F64))
    assert both.value.item() == pytest.approx(d2.mean().item(), rel=1e-12)
    first = ode_pair_loss(student, endpoint, torch.tensor([[0.5], [0.0]], dtype=F64))
    assert first.value.item() == pytest.approx(d2[0].mean().item() / 2, rel=1e-12)


@pytest.mark.parametrize("columns", [1, 3])
def test_pick_states_on_square_data(columns):
    n = 3
    trajectory = torch.randn(n, n, n, n, n, n, generator=torch.Generator().manual_seed(0))
    index = torch.randint(n, (n, columns), generator=torch.Generator().manual_seed(1))
    picked = pick_states(trajectory, index)
    assert picked.shape == (n,) * 5
    for b in range(n):
        for f in range(n):
            assert torch.equal(picked[b, :, f], trajectory[b, index[b, f if columns > 1 else 0], :, f])
    with pytest.raises(ValueError, match="B, K, C, T, H, W"):
        pick_states(trajectory[0], index)
    with pytest.raises(ValueError, match="expected"):
        pick_states(trajectory, index[:, 0])


CALLS = {
    "diffusion": lambda v, **k: diffusion_loss(v, *_rand(2, 5), torch.full((2, 1), 0.5, dtype=F64), **k),
    "bidirectional_critic": lambda v, **k: bidirectional_critic_loss(v, *_rand(2, 5), torch.full((2, 1), 0.5, dtype=F64), **k),
    "causal_critic": lambda v, **k: causal_critic_loss(v, *_rand(2, 5), **k),
    "ode_pairs": lambda v, **k: ode_pair_loss(v, _rand(1, 5)[0], torch.full((2, 1), 0.5, dtype=F64), **k),
}


@pytest.mark.parametrize("name", CALLS)
def test_nonfinite_policy(name):
    v = _rand(1)[0]
    v[0, 0, 0, 0, 0] = float("nan")
    v.requires_grad_()
    loud = CALLS[name](v)
    assert loud.value.isnan() and loud.logs[f"{loud.name}/nonfinite_samples"] == 1
    quiet = CALLS[name](v, nonfinite="zero_sample", name="renamed")
    (grad,) = torch.autograd.grad(quiet.value, v)
    assert quiet.logs["renamed/nonfinite_samples"] == 1 and quiet.value.isfinite()
    assert (grad[0] == 0).all() and (grad[1] != 0).all()


@pytest.mark.parametrize("name", CALLS)
def test_broadcasts_are_refused(name):
    with pytest.raises(ValueError, match="shapes must agree"):
        CALLS[name](_rand(1)[0][:, :, :1])


def test_targets_are_constants():
    v, x0, eps = (x.requires_grad_() for x in _rand(3))
    t = torch.full((2, 1), 0.5, dtype=F64)
    for term in (
        diffusion_loss(v, x0, eps, t),
        bidirectional_critic_loss(v, x0, eps, t),
        causal_critic_loss(v, x0, eps),
        ode_pair_loss(v, x0, t),
    ):
        term.value.backward()
    assert x0.grad is None and eps.grad is None and v.grad is not None
