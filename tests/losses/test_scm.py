import math

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion import interpolant as I
from rcm.diffusion.time import per_frame
from rcm.diffusion.wan_as_trigflow import rf_point, trig_F
from rcm.losses.scm import normalise, rf_tangent, scm_regression, trigflow_tangent, warmup_ratio
from tests.support.linear_gaussian import LinearGaussian
from tests.support.toy_field import ToyField

F64 = torch.float64
N = 3
VARIANTS = ["paper", "release", "original"]


def _rand(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, N, N, N, N, generator=g, dtype=F64) for _ in range(count)]


def _tau(columns=1, seed=1):
    return 0.1 + 1.3 * torch.rand(N, columns, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _rf_parts(net, teacher, x_t, t):
    v_teacher = teacher(x_t, t)
    v, jvp = torch.func.jvp(net, (x_t, t), (v_teacher, torch.ones_like(t)))
    return v, v_teacher, jvp


def _trig_parts(net, teacher, x_tau, tau):
    """F, F_T and the rearranged tangent by forward mode through the whole wrapper."""

    def wrap(field):
        def F(x_tau, tau):
            x_t, t = rf_point(x_tau, tau)
            return trig_F(x_t, field(x_t, t), tau)

        return F

    F_teacher = wrap(teacher)(x_tau, tau)
    cs = torch.cos(tau) * torch.sin(tau)
    F, jvp_cs = torch.func.jvp(wrap(net), (x_tau, tau), (per_frame(cs, x_tau) * F_teacher, cs))
    return F, F_teacher, jvp_cs


@pytest.mark.parametrize("columns", [1, N])
def test_rf_tangent_is_the_derivative_of_the_consistency_function(columns):
    """df/dt of f = x - t v along (V, 1), by forward mode through f itself."""
    net, teacher = ToyField(seed=0), ToyField(seed=1)
    (x_t,), t = _rand(1), _tau(columns) / 1.6
    v, v_teacher, jvp = _rf_parts(net, teacher, x_t, t)
    _, expected = torch.func.jvp(lambda x, t: I.rf_x0(x, net(x, t), t), (x_t, t), (v_teacher, torch.ones_like(t)))
    torch.testing.assert_close(rf_tangent(v, v_teacher, jvp, t), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trigflow_tangent_is_the_weighted_derivative(variant):
    """cos(tau) df/dtau of f = cos x - sin F along (F_T, 1), all variants at full warm-up."""
    net, teacher = ToyField(seed=0), ToyField(seed=1)
    (x_tau,), tau = _rand(1), _tau()
    F, F_teacher, jvp_cs = _trig_parts(net, teacher, x_tau, tau)

    def f(x_tau, tau):
        x_t, t = rf_point(x_tau, tau)
        return I.trig_x0(x_tau, trig_F(x_t, net(x_t, t), tau), tau)

    _, slope = torch.func.jvp(f, (x_tau, tau), (F_teacher, torch.ones_like(tau)))
    expected = per_frame(torch.cos(tau), x_tau) * slope
    got = trigflow_tangent(F, F_teacher, jvp_cs, x_tau, tau, variant=variant)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_both_forms_agree_at_full_warmup():
    """g_trig(r=1) = cos tau b^2 (V - v - t J) (docs/reference/objectives.md#wrapper), both tangents
    from forward mode.
    """
    net, teacher = ToyField(seed=0), ToyField(seed=1)
    (x_tau,), tau = _rand(1), _tau()
    g_trig = trigflow_tangent(*_trig_parts(net, teacher, x_tau, tau), x_tau, tau)
    x_t, t = rf_point(x_tau, tau)
    v, v_teacher, jvp = _rf_parts(net, teacher, x_t, t)
    g_rf = rf_tangent(v, v_teacher, jvp, t)
    torch.testing.assert_close(g_rf, v_teacher - v - per_frame(t, x_t) * jvp, rtol=1e-13, atol=1e-13)
    factor = torch.cos(tau) / (torch.cos(tau) + torch.sin(tau)) ** 2
    torch.testing.assert_close(g_trig, per_frame(factor, x_t) * g_rf, rtol=1e-10, atol=1e-10)


def test_true_consistency_map_has_zero_tangent():
    """Fixed point (docs/reference/objectives.md#fixed-points): a student that is the
    linear-Gaussian consistency map; and it is not a fixed point of a wrong student.
    """
    world = LinearGaussian()
    (x,), tau = _rand(1), _tau()
    x_t, t = rf_point(x, tau)

    def field(fn):
        return lambda x, t: fn(x, per_frame(t, x))

    parts = _rf_parts(field(world.rf_student), field(world.rf_velocity), x_t, t)
    assert rf_tangent(*parts, t).abs().max() < 1e-11
    wrong = _rf_parts(lambda x, t: 1.01 * world.rf_student(x, per_frame(t, x)), field(world.rf_velocity), x_t, t)
    assert rf_tangent(*wrong, t).abs().max() > 1e-3

    cs = torch.cos(tau) * torch.sin(tau)
    F_teacher = field(world.trig_velocity)(x, tau)
    F, jvp_cs = torch.func.jvp(field(world.trig_student), (x, tau), (per_frame(cs, x) * F_teacher, cs))
    for variant in VARIANTS:
        assert trigflow_tangent(F, F_teacher, jvp_cs, x, tau, variant=variant).abs().max() < 1e-11


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("columns", [1, N])
def test_warmup_element_by_element(r, columns):
    """The formulas of Causal_rCM.md sections 5, 8, written out with scalars on square data."""
    F, F_T, T, x = _rand(4, seed=3)
    tau = _tau(columns)
    for b, c, f, h, w in ((0, 1, 2, 0, 1), (2, 0, 1, 1, 0), (1, 2, 0, 2, 2)):
        i, a = (b, c, f, h, w), tau[b, f if columns > 1 else 0].item()
        C, S = math.cos(a), math.sin(a)
        delta, root = (F[i] - F_T[i]).item(), math.sqrt(1 - r * r * S * S)
        expected = {
            "paper": -C * root * delta - r * (C * S * x[i].item() + T[i].item()),
            "release": -C * root * delta - (r * C * S * x[i].item() + T[i].item()),
            "original": -C * C * delta - r * (C * S * x[i].item() + T[i].item()),
        }
        for variant, value in expected.items():
            assert trigflow_tangent(F, F_T, T, x, tau, warmup=r, variant=variant)[i].item() == pytest.approx(value, rel=1e-12, abs=1e-13)
        t = a / 2
        assert rf_tangent(F, F_T, T, tau / 2, warmup=r)[i].item() == pytest.approx(-delta - r * t * T[i].item(), rel=1e-12, abs=1e-13)


def test_tangent_is_finite_at_pure_noise_in_float32():
    F, F_T, T, x = (z.float() for z in _rand(4))
    top = torch.full((N, 1), math.pi / 2, dtype=torch.float32)
    for r in (0.5, 1.0):
        for variant in VARIANTS:
            g = trigflow_tangent(F, F_T, T, x, top, warmup=r, variant=variant)
            assert g.isfinite().all() and g.dtype == torch.float32


def test_tangents_are_constants():
    F, F_T, T, x = (z.requires_grad_() for z in _rand(4))
    assert not trigflow_tangent(F, F_T, T, x, _tau()).requires_grad
    assert not rf_tangent(F, F_T, T, _tau()).requires_grad
    assert not normalise(F).requires_grad


def test_warmup_ratio():
    assert [warmup_ratio(i, warmup_steps=1000) for i in (0, 250, 1000, 5000)] == [0.0, 0.25, 1.0, 1.0]
    assert warmup_ratio(0, warmup_steps=0) == 1.0
    for args in ((-1, 10), (1, -10)):
        with pytest.raises(ValueError, match="tangent_warmup"):
            warmup_ratio(args[0], warmup_steps=args[1])


def test_normalise_one_norm_per_sample():
    g = _rand(1)[0]
    g_hat = normalise(g)
    for b in range(N):
        norm = math.sqrt(sum(v * v for v in g[b].flatten().tolist()))
        torch.testing.assert_close(g_hat[b], g[b] / (norm + 0.1), rtol=1e-13, atol=0)
    torch.testing.assert_close(normalise(g, c=2.0)[0] * (g[0].norm() + 2.0), g[0], rtol=1e-13, atol=0)
    assert torch.equal(normalise(torch.zeros(2, 1, 1, 1, 1)), torch.zeros(2, 1, 1, 1, 1))


def test_normalise_survives_large_float32():
    """Squares of 1e25 overflow float32: the norm must be float64."""
    g = torch.full((1, 2, 2, 2, 2), 1e25)
    torch.testing.assert_close(normalise(g), torch.full_like(g, 0.25), rtol=1e-6, atol=0)
    assert normalise(g.bfloat16()).dtype == torch.float32


def test_nan_spreads_over_its_sample_only():
    g = _rand(1)[0]
    g[1, 0, 0, 0, 0] = float("nan")
    finite = normalise(g).isfinite().flatten(1)
    assert finite[0].all() and finite[2].all() and not finite[1].any()


def test_gradient_is_the_papers():
    """-2 loss_scale g_hat per sample (-200 g_hat), then the mean over the batch; value loss_scale
    sum g_hat^2.
    """
    pred, g = _rand(2)
    pred.requires_grad_()
    g_hat = normalise(g)
    term = scm_regression(pred, g_hat)
    (grad,) = torch.autograd.grad(term.value, pred)
    torch.testing.assert_close(grad, -200 * g_hat / N, rtol=1e-12, atol=1e-15)
    assert term.value.item() == pytest.approx(100 * (g_hat**2).sum().item() / N, rel=1e-12)
    assert term.name == "scm" and term.logs["scm/nonfinite_samples"] == 0
    assert term.logs["scm/g_hat_norm"].item() == pytest.approx(sum(g_hat[b].norm().item() for b in range(N)) / N)
    (other,) = torch.autograd.grad(scm_regression(pred, g_hat, loss_scale=7.0, name="x").value, pred)
    torch.testing.assert_close(other, -14 * g_hat / N, rtol=1e-12, atol=1e-15)


def test_a_descent_step_moves_the_student_to_the_teacher():
    """With J = 0 the tangent is V - v: the update must reduce |v - V|, not increase it."""
    v, v_teacher = _rand(2)
    v.requires_grad_()
    g_hat = normalise(rf_tangent(v, v_teacher, torch.zeros_like(v), _tau()))
    (grad,) = torch.autograd.grad(scm_regression(v, g_hat).value, v)
    assert ((v - 1e-3 * grad - v_teacher).norm() < (v - v_teacher).norm()).item()


@pytest.mark.parametrize("where", ["pred", "g"])
def test_nonfinite_policies(where):
    pred, g = _rand(2)
    (pred if where == "pred" else g)[1, 0, 0, 0, 0] = float("nan")
    pred.requires_grad_()
    loud = scm_regression(pred, normalise(g))
    assert loud.value.isnan() and loud.logs["scm/nonfinite_samples"] == 1
    quiet = scm_regression(pred, normalise(g), nonfinite="zero_sample")
    (grad,) = torch.autograd.grad(quiet.value, pred)
    assert quiet.value.isfinite() and quiet.logs["scm/nonfinite_samples"] == 1
    assert (grad[1] == 0).all()
    torch.testing.assert_close(grad[::2], -200 * normalise(g)[::2] / N, rtol=1e-12, atol=1e-15)


def test_mistakes_raise():
    F, F_T, T, x = _rand(4)
    with pytest.raises(ConfigError, match="'scm'.*paper, release, original"):
        trigflow_tangent(F, F_T, T, x, _tau(), variant="scm")
    for r in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="warm-up"):
            rf_tangent(F, F_T, T, _tau(), warmup=r)
    with pytest.raises(ValueError, match="v_teacher"):
        rf_tangent(F, F_T[:1], T, _tau())
    with pytest.raises(ValueError, match="x_tau"):
        trigflow_tangent(F, F_T, T, x[:, :1], _tau())
    with pytest.raises(ValueError, match="g_hat"):
        scm_regression(F, F_T[:1])
    with pytest.raises(ValueError, match="expected"):
        rf_tangent(F, F_T, T, _tau().flatten())
