import math

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.directional import Discrete, Exact, RFStep, SemiContinuous, TrigStep
from rcm.diffusion.time import per_frame
from tests.support.toy_field import ToyField

F64 = torch.float64
N = 3


def _setup(columns=1):
    g = torch.Generator().manual_seed(5)
    x, velocity = (torch.randn(N, N, N, N, N, generator=g, dtype=F64) for _ in range(2))
    t = 0.2 + 0.6 * torch.rand(N, columns, generator=g, dtype=F64)
    return ToyField(seed=3), x, velocity, t, torch.cos(t) * torch.sin(t)


def _truth(field, x, t, velocity, scale):
    return torch.func.jvp(field, (x, t), (per_frame(scale, x) * velocity, scale.expand_as(t).clone()))[1]


SCHEMES = [Exact(), SemiContinuous(RFStep()), SemiContinuous(TrigStep()), Discrete(RFStep()), Discrete(TrigStep())]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("columns", [1, N])
@pytest.mark.parametrize("with_scale", [True, False])
def test_every_scheme_approximates_the_derivative(scheme, columns, with_scale):
    field, x, velocity, t, scale = _setup(columns)
    if not isinstance(scheme, Exact):
        scale = scale[:, :1]
    truth = _truth(field, x, t, velocity, scale if with_scale else torch.ones_like(t))
    got = scheme(field, x, t, velocity=velocity, scale=scale if with_scale else None)
    tolerance = 1e-13 if isinstance(scheme, Exact) else 2e-3
    assert (got - truth).norm() < tolerance * truth.norm()
    assert not got.requires_grad


@pytest.mark.parametrize("kind", [SemiContinuous, Discrete])
@pytest.mark.parametrize("geometry", [RFStep(), TrigStep()], ids=["rf", "trig"])
def test_differences_are_first_order(kind, geometry):
    field, x, velocity, t, scale = _setup()
    truth = _truth(field, x, t, velocity, scale)
    errors = [(kind(geometry, h)(field, x, t, velocity=velocity, scale=scale) - truth).norm() for h in (2e-3, 1e-3)]
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_release_formulas_are_followed_to_the_digit():
    """docs/reference/objectives.md#differences, with a step so large that any other first-order
    scheme differs.
    """
    field, x, F_teacher, tau, cs = _setup()
    h = 0.3
    wide = per_frame(cs, x)
    x_jvp = torch.func.jvp(lambda x: field(x, tau), (x,), (wide * F_teacher,))[1]
    semi = x_jvp + wide * (math.cos(h) * field(x, tau) - field(x, tau - h)) / math.sin(h)
    torch.testing.assert_close(SemiContinuous(TrigStep(), h)(field, x, tau, velocity=F_teacher, scale=cs), semi, rtol=1e-12, atol=1e-12)
    back = math.cos(h) * x - math.sin(h) * F_teacher
    discrete = wide * (math.cos(h) * field(x, tau) - field(back, tau - h)) / math.sin(h)
    torch.testing.assert_close(Discrete(TrigStep(), h)(field, x, tau, velocity=F_teacher, scale=cs), discrete, rtol=1e-12, atol=1e-12)


def test_trig_step_is_exact_on_its_path():
    """x and F of one pair (x0, eps): stepping back by h lands on the path, and the slope of F along
    it is exactly -x (step error aside).
    """
    _, x0, eps, tau, _ = _setup()
    tau = per_frame(tau, x0)
    h = 0.4
    x, F = torch.cos(tau) * x0 + torch.sin(tau) * eps, torch.cos(tau) * eps - torch.sin(tau) * x0
    expected = torch.cos(tau - h) * x0 + torch.sin(tau - h) * eps
    torch.testing.assert_close(TrigStep().back(x, F, h), expected, rtol=1e-13, atol=1e-13)
    before = torch.cos(tau - h) * eps - torch.sin(tau - h) * x0
    torch.testing.assert_close(TrigStep().slope(F, before, h), -x, rtol=1e-12, atol=1e-12)


def test_packed_input_needs_a_scale_with_zeros():
    """Exact with scale [B, T] zero on the clean frames is the tangent [0; V], [0; 1] of teacher
    forcing (Causal_rCM.md section 5).
    """
    field, x, velocity, t, _ = _setup(N)
    scale = torch.tensor([[0.0, 0.0, 1.0]], dtype=F64).expand(N, N)
    only_last = velocity.clone()
    only_last[:, :, :2] = 0
    truth = torch.func.jvp(field, (x, t), (only_last, scale.clone()))[1]
    torch.testing.assert_close(Exact()(field, x, t, velocity=velocity, scale=scale), truth, rtol=1e-13, atol=1e-13)


def test_number_of_network_passes_and_no_graph():
    """Cost matters: one pass for Exact, two for the differences; the finite schemes never build a
    graph.
    """
    for scheme, passes in ((Exact(), 1), (SemiContinuous(TrigStep()), 2), (Discrete(TrigStep()), 2)):
        field, x, velocity, t, scale = _setup()
        weight = torch.ones((), dtype=F64, requires_grad=True)
        calls = []

        def net(x, t, field=field, weight=weight, calls=calls):
            calls.append(torch.is_grad_enabled())
            return weight * field(x, t)

        out = scheme(net, x, t, velocity=velocity, scale=scale)
        assert calls == [False] * passes and not out.requires_grad


@pytest.mark.parametrize("h", [0.0, -1e-4, 1.0])
def test_bad_steps(h):
    for kind in (SemiContinuous, Discrete):
        with pytest.raises(ConfigError, match="fd_size"):
            kind(RFStep(), h)


def test_a_scale_per_frame_is_refused_by_differences():
    field, x, velocity, t, scale = _setup(N)
    for kind in (SemiContinuous, Discrete):
        with pytest.raises(ValueError, match="Exact"):
            kind(RFStep())(field, x, t, velocity=velocity, scale=scale)
