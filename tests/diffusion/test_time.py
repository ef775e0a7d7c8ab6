import math

import pytest
import torch

from rcm.diffusion import time as T

F64 = torch.float64
INNER = torch.linspace(0.01, 0.99, 23, dtype=F64)


def _slope(fn, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fn(x).sum(), x)
    return grad


def test_rf_to_trig_has_the_same_signal_to_noise_ratio():
    """Definition: sigma = tan(tau) = t / (1 - t)."""
    tau = T.rf_to_trig(INNER)
    torch.testing.assert_close(torch.tan(tau), INNER / (1 - INNER), rtol=1e-13, atol=0)
    assert ((tau > 0) & (tau < math.pi / 2)).all()


def test_trig_to_rf_rescales_the_sample():
    """Definition: cos x0 + sin eps = Z ((1 - t) x0 + t eps), so t = sin/Z and 1 - t = cos/Z."""
    tau = torch.linspace(0, math.pi / 2, 31, dtype=F64)
    z = torch.cos(tau) + torch.sin(tau)
    t = T.trig_to_rf(tau)
    torch.testing.assert_close(t * z, torch.sin(tau), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close((1 - t) * z, torch.cos(tau), rtol=1e-13, atol=1e-15)


def test_derivatives():
    tau = torch.linspace(0.0, math.pi / 2, 31, dtype=F64)
    z = torch.cos(tau) + torch.sin(tau)
    torch.testing.assert_close(_slope(T.trig_to_rf, tau), 1 / z**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(_slope(T.rf_to_trig, INNER), 1 / ((1 - INNER) ** 2 + INNER**2), rtol=1e-12, atol=0)


def test_known_values():
    assert T.rf_to_timestep(torch.tensor(15 / 16, dtype=F64)).item() == 937.5
    assert T.rf_to_trig(torch.tensor(0.5, dtype=F64)).item() == pytest.approx(math.pi / 4, rel=1e-15)
    assert T.trig_to_rf(torch.tensor(1.5, dtype=F64)).item() == pytest.approx(math.tan(1.5) / (1 + math.tan(1.5)), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(dtype):
    zero, one, half_pi = (torch.tensor(v, dtype=dtype) for v in (0.0, 1.0, math.pi / 2))
    assert T.rf_to_trig(zero) == 0 and T.rf_to_trig(one) == half_pi
    assert T.trig_to_rf(zero) == 0 and abs(T.trig_to_rf(half_pi) - 1) < 1e-6
    tiny = torch.tensor([1e-8, 1e-6, 1e-4], dtype=dtype)
    torch.testing.assert_close(T.rf_to_trig(tiny), tiny + tiny**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(T.trig_to_rf(tiny), tiny - tiny**2, rtol=1e-6, atol=0)


def test_round_trip():
    torch.testing.assert_close(T.trig_to_rf(T.rf_to_trig(INNER)), INNER, rtol=1e-13, atol=0)


@pytest.mark.parametrize("s", [1.0, 3.0, 5.0, 0.4])
def test_shift(s):
    """Definition: the shift multiplies sigma by s."""
    shifted = T.shift_time(INNER, s)
    torch.testing.assert_close(shifted / (1 - shifted), s * INNER / (1 - INNER), rtol=1e-12, atol=0)
    torch.testing.assert_close(T.unshift_time(shifted, s), INNER, rtol=1e-13, atol=0)
    torch.testing.assert_close(_slope(lambda u: T.shift_time(u, s), INNER), s / (1 + (s - 1) * INNER) ** 2, rtol=1e-12, atol=0)
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert torch.equal(T.shift_time(ends, s), ends) and torch.equal(T.unshift_time(ends, s), ends)
    assert isinstance(T.shift_time(0.25, s), float)


def test_shift_of_the_published_schedule():
    """backward_timesteps are shift 5 of 3/4, 1/2, 1/4; with shift3_backward, shift 3
    (docs/reference/training.md#causal-keys).
    """
    assert [T.shift_time(u, 5.0) for u in (0.75, 0.5, 0.25)] == pytest.approx([15 / 16, 5 / 6, 5 / 8], rel=1e-15)
    assert [T.shift_time(u, 3.0) for u in (0.75, 0.5, 0.25)] == pytest.approx([0.9, 0.75, 0.5], rel=1e-15)
    assert [T.unshift_time(u, 5.0) for u in (15 / 16, 5 / 6, 5 / 8)] == pytest.approx([0.75, 0.5, 0.25], rel=1e-14)


@pytest.mark.parametrize("s", [0.0, -2.0])
def test_no_shift(s):
    assert T.shift_time(INNER, s) is INNER and T.unshift_time(INNER, s) is INNER


def test_low_precision_times_are_refused():
    for fn in (T.rf_to_trig, T.trig_to_rf, T.rf_to_timestep):
        with pytest.raises(TypeError, match="bfloat16"):
            fn(torch.zeros(2, 1, dtype=torch.bfloat16))
        with pytest.raises(TypeError, match="int64"):
            fn(torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("columns", ["one", "frames"])
def test_per_frame_on_square_data(columns):
    """Every axis has length 4: only the batch and frame axes may be matched."""
    n = 4
    x = torch.zeros(n, n, n, n, n)
    t = torch.arange(n * (1 if columns == "one" else n), dtype=F64).reshape(n, -1)
    wide = (T.per_frame(t, x) + x).double()
    for b in range(n):
        for f in range(n):
            expected = t[b, 0 if columns == "one" else f]
            assert (wide[b, :, f] == expected).all()
    assert T.per_frame(t, x).dtype == F64


def test_per_frame_refuses_other_shapes():
    x = torch.zeros(3, 3, 3, 3, 3)
    for shape in ((3,), (), (1, 3), (2, 1), (3, 2), (3, 3, 1), (3, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="expected \\(3, 1\\) or \\(3, 3\\)"):
            T.per_frame(torch.zeros(shape), x)
    with pytest.raises(ValueError, match="B, C, T, H, W"):
        T.per_frame(torch.zeros(3, 1), torch.zeros(3, 3, 3, 3))
