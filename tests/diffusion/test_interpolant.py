import math

import pytest
import torch

from rcm.diffusion import interpolant as I
from rcm.diffusion.directional import Discrete, RFStep
from rcm.diffusion.wan_as_trigflow import trig_F

F64 = torch.float64
N = 3  # every axis, so that a wrong broadcast cannot fail by shape


def _latents(count, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, N, N, N, N, generator=g, dtype=F64).to(dtype) for _ in range(count)]


def _times(columns, top, seed=1):
    return top * (0.05 + 0.9 * torch.rand(N, columns, generator=torch.Generator().manual_seed(seed), dtype=F64))


def _loop(fn, t):
    """Apply a scalar-time formula sample by sample and frame by frame."""
    out = torch.empty(N, N, N, N, N, dtype=F64)
    for b in range(N):
        for f in range(N):
            out[b, :, f] = fn((b, slice(None), f), t[b, f if t.shape[1] > 1 else 0].item())
    return out


@pytest.fixture(params=[1, N], ids=["per_sample", "per_frame"])
def columns(request):
    return request.param


def test_rf_definitions(columns):
    x0, eps = _latents(2)
    t = _times(columns, 1.0)
    x_t = _loop(lambda i, t: (1 - t) * x0[i] + t * eps[i], t)
    torch.testing.assert_close(I.rf_noise(x0, eps, t), x_t, rtol=1e-14, atol=1e-14)
    v = I.rf_velocity(x0, eps)
    torch.testing.assert_close(I.rf_x0(x_t, v, t), x0, rtol=1e-12, atol=1e-13)


def test_trig_definitions(columns):
    x0, eps = _latents(2)
    tau = _times(columns, math.pi / 2)
    x_tau = _loop(lambda i, t: math.cos(t) * x0[i] + math.sin(t) * eps[i], tau)
    velocity = _loop(lambda i, t: math.cos(t) * eps[i] - math.sin(t) * x0[i], tau)
    torch.testing.assert_close(I.trig_noise(x0, eps, tau), x_tau, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(I.trig_velocity(x0, eps, tau), velocity, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(I.trig_x0(x_tau, velocity, tau), x0, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("path", ["rf", "trig"])
def test_velocity_is_the_derivative_of_the_path(path, columns):
    x0, eps = _latents(2)
    t = _times(columns, 1.0)
    noise = getattr(I, f"{path}_noise")
    # One time per sample or frame: the forward derivative in the direction of ones is d/dt of every
    # element.
    _, slope = torch.func.jvp(lambda t: noise(x0, eps, t), (t,), (torch.ones_like(t),))
    expected = I.rf_velocity(x0, eps) if path == "rf" else I.trig_velocity(x0, eps, t)
    torch.testing.assert_close(slope, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("path", "top"), [("rf", 1.0), ("trig", math.pi / 2)])
def test_ends_are_exact_in_float32(path, top):
    x0, eps, v = _latents(3, dtype=torch.float32)
    start, end = torch.zeros(N, 1, dtype=F64), torch.full((N, 1), top, dtype=F64)
    noise, data = getattr(I, f"{path}_noise"), getattr(I, f"{path}_x0")
    assert torch.equal(noise(x0, eps, start), x0)
    torch.testing.assert_close(noise(x0, eps, end), eps, rtol=0, atol=1e-15)
    assert torch.equal(data(x0, v, start), x0)


def test_euler_steps():
    x, v = _latents(2)
    t, t_next = _times(1, 1.0), _times(1, 0.5, seed=2)
    expected = _loop(lambda i, dt: x[i] - dt * v[i], t - t_next)
    torch.testing.assert_close(I.rf_euler(x, v, t, t_next), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(I.trig_euler(x, v, t, t_next), expected, rtol=1e-14, atol=1e-14)


def test_rf_euler_is_exact_on_a_straight_path_and_trig_is_second_order():
    x0, eps = _latents(2)
    t, t_next = torch.full((N, 1), 0.8, dtype=F64), torch.full((N, 1), 0.3, dtype=F64)
    stepped = I.rf_euler(I.rf_noise(x0, eps, t), I.rf_velocity(x0, eps), t, t_next)
    torch.testing.assert_close(stepped, I.rf_noise(x0, eps, t_next), rtol=1e-13, atol=1e-13)

    errors = []
    for h in (0.02, 0.01):
        stepped = I.trig_euler(I.trig_noise(x0, eps, t), I.trig_velocity(x0, eps, t), t, t - h)
        errors.append((stepped - I.trig_noise(x0, eps, t - h)).norm())
    assert 3.9 < errors[0] / errors[1] < 4.1


def test_float64_times_do_not_widen_the_latents():
    x0, eps, v = _latents(3, dtype=torch.float32)
    t = _times(1, 1.0)
    calls = {
        "rf_noise": (x0, eps, t), "rf_x0": (x0, v, t), "rf_euler": (x0, v, t, t / 2),
        "trig_noise": (x0, eps, t), "trig_velocity": (x0, eps, t), "trig_x0": (x0, v, t), "trig_euler": (x0, v, t, t / 2),
    }  # fmt: skip
    for name, args in calls.items():
        out = getattr(I, name)(*args)
        assert out.dtype == torch.float32, name
        wide = getattr(I, name)(*(a.double() for a in args))
        torch.testing.assert_close(out, wide.float(), rtol=3e-6, atol=3e-6, msg=name)
    assert I.scale_per_frame(t, x0.bfloat16()).dtype == torch.float32, "half precision is widened, not the coefficient narrowed"


def test_flat_times_are_refused():
    x0, eps = _latents(2)
    for name in ("rf_noise", "trig_noise", "rf_x0", "trig_x0", "trig_velocity"):
        with pytest.raises(ValueError, match="expected"):
            getattr(I, name)(x0, eps, torch.rand(N, dtype=F64))


def test_latents_that_would_broadcast_and_coarse_times_are_refused():
    """A velocity of one channel, frame or sample would serve all of them unseen."""
    x, y = _latents(2)
    t = _times(1, 1.0)
    calls = {
        "rf_noise": (t,), "rf_velocity": (), "rf_x0": (t,), "rf_euler": (t, t / 2),
        "trig_noise": (t,), "trig_velocity": (t,), "trig_x0": (t,), "trig_euler": (t, t / 2),
    }  # fmt: skip
    for name, times in calls.items():
        for narrow in (y[:1], y[:, :1], y[:, :, :1], y[..., 0]):
            with pytest.raises(ValueError, match="shapes must agree"):
                getattr(I, name)(x, narrow, *times)
        for dtype in (torch.bfloat16, torch.float16):
            if times:
                with pytest.raises(TypeError, match="time is .* expected float64"):
                    getattr(I, name)(x, y, *(time.to(dtype) for time in times))
    with pytest.raises(ValueError, match="shapes must agree"):
        trig_F(x, y[:, :1], t)
    with pytest.raises(ValueError, match="shapes must agree"):
        Discrete(RFStep())(lambda x, t: x, x, t, velocity=y[:, :1])
