"""Consistency methods on a linear-Gaussian world whose consistency map is known, and on a tiny
network against independent recomputation.
"""

from __future__ import annotations

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.directional import Discrete, Exact, SemiContinuous, TrigStep
from rcm.diffusion.time_sampling import ConsistencyGrid, LogNormal, UniformShift
from rcm.methods.base import Joint, Phase
from rcm.methods.rcm import BackwardSimulation, ContinuousConsistency, DiscreteConsistency
from rcm.methods.schedule import Alternation
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.methods.tf_dcm import TFDiscreteConsistency
from rcm.methods.tf_scm import TFContinuousConsistency
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.layout import TokenLayout
from rcm.rollout.plan import ContextRule, StepSchedule
from tests.support.analytic import AnalyticDenoiser, gaussian_pair
from tests.support.linear_gaussian import LinearGaussian
from tests.support.tangent_oracle import functorch_jvp, with_eager_attention
from tests.support.tiny_nets import HEIGHT, PATTERNS, WIDTH, condition, latents, tiny_config, tiny_net

WORLD = LinearGaussian()
FORCING = TeacherForcing(BlockPattern(3, 3))
FIRST = Phase("student", 0, 0)
LAW = LogNormal(-0.8, 1.6)


def batch(frames: int = 6, *, shape=None) -> LatentBatch:
    x = WORLD.mu + WORLD.s * latents(frames) if shape is None else latents(frames)
    return LatentBatch(x, condition(tiny_config()).text, ["a", "b"], ["0", "1"])


def only_term(method, data=None, phase=FIRST, rng=None):
    (thunk,) = method.terms(phase, data or batch(), rng or StepRng(0, 0, 0))
    return thunk()


def continuous(student, teacher, form):
    if form == "tf":
        return TFContinuousConsistency(student, teacher, law=LAW, tangent_warmup=0, forcing=FORCING)
    return ContinuousConsistency(student, teacher, law=LAW, rf_native=form == "rf")


@pytest.mark.parametrize("form", ["tf", "trig", "rf"])
def test_tangent_vanishes_at_the_true_consistency_map(form):
    """g is normalised with +0.1, so a vanishing tangent shows as a vanishing ||g_hat||; a student
    off by 0.1 shows as one near 1.
    """
    student, teacher = gaussian_pair(WORLD)
    method = continuous(student, teacher, form)
    assert only_term(method).logs[f"{method.name}/g_hat_norm"] < 1e-4
    wrong = AnalyticDenoiser(lambda x, t: WORLD.rf_student(x, t) + 0.1)
    assert only_term(continuous(wrong, teacher, form)).logs[f"{method.name}/g_hat_norm"] > 0.8


@pytest.mark.parametrize("causal", [True, False])
def test_discrete_residual_is_of_second_order(causal):
    """The loss is the squared residual of one Euler step, so halving the step divides it by about
    16.
    """
    student, teacher = gaussian_pair(WORLD)

    def loss(n: int) -> float:
        grid = ConsistencyGrid(num_steps=n, shift=1.0)
        method = (
            TFDiscreteConsistency(student, teacher, grid=grid, forcing=FORCING)
            if causal
            else DiscreteConsistency(student, teacher, grid=grid)
        )
        return sum(only_term(method, rng=StepRng(0, step, 0)).value.item() for step in range(40))

    assert 10 < loss(64) / loss(128) < 24


def test_trig_and_difference_schemes_agree():
    """Exact, semi-continuous and discrete tangents give one gradient, up to the step of the
    difference.
    """
    student, teacher = Denoiser(tiny_net(seed=1), Precision.preset("fp64")), Denoiser(tiny_net(seed=2), Precision.preset("fp64"))
    grads = []
    for directional in (Exact(), SemiContinuous(TrigStep(), 1e-6), Discrete(TrigStep(), 1e-6)):
        student.net.zero_grad()
        only_term(ContinuousConsistency(student, teacher, law=LAW, directional=directional), batch(shape="net")).value.backward()
        grads.append(torch.cat([p.grad.flatten() for p in student.net.parameters()]))
    for other in grads[1:]:
        assert (other - grads[0]).norm() / grads[0].norm() < 2e-3


@pytest.mark.parametrize("name", PATTERNS)
def test_context_cached_tangent_equals_packed_functorch(name):
    """The tangent pass over cached clean context equals torch.func.jvp of the packed pass with
    tangents [0; V], [0; 1] on eager attention.
    """
    forcing, frames = TeacherForcing(BlockPattern.parse(name)), PATTERNS[name]
    net, cond = tiny_net(), condition(tiny_config())
    student, eager = Denoiser(net, Precision.preset("fp64")), Denoiser(with_eager_attention(net), Precision.preset("fp64"))
    x0, x_t, x_dot = latents(frames), latents(frames, seed=7), latents(frames, seed=8)
    t = torch.full((2, 1), 0.4, dtype=torch.float64)
    v, v_dot = forcing.tangent(student, x_t, t, cond, context=forcing.clean(x0), x_dot=x_dot, t_dot=torch.ones_like(t))
    zeros = torch.zeros(2, frames, dtype=torch.float64)
    layout = TokenLayout.teacher_forcing(frames, grid=(2, 3), pattern=forcing.pattern)
    expected = functorch_jvp(
        lambda x, time: eager.velocity(x, time, cond, layout),
        (torch.cat([x0, x_t], 2), torch.cat([zeros, t.expand(2, frames)], 1)),
        (torch.cat([torch.zeros_like(x0), x_dot], 2), torch.cat([zeros, torch.ones_like(zeros)], 1)),
    )
    torch.testing.assert_close((v, v_dot), expected, rtol=0, atol=1e-9)


def test_scm_gradient_is_the_papers():
    """Gradient of the whole method = -2 loss_scale g_hat pulled back through v, with g from
    Causal_rCM.md section 5 assembled here by hand.
    """
    forcing = FORCING
    student, teacher = Denoiser(tiny_net(seed=1), Precision.preset("fp64")), Denoiser(tiny_net(seed=2), Precision.preset("fp64"))
    negative = condition(tiny_config(), batch=1, seed=11)
    method = TFContinuousConsistency(
        student, Guided(teacher, negative, 3.0), law=UniformShift(5.0), tangent_warmup=1000, forcing=forcing, loss_scale=100.0
    )
    data, rng = batch(shape="net"), StepRng(3, 4, 0)
    only_term(method, data, Phase("student", 250, 250), rng).value.backward()
    got = [p.grad.clone() for p in student.net.parameters()]
    student.net.zero_grad()

    x0, cond = data.latents, Condition(data.text)
    t = UniformShift(5.0).sample((2, 1), generator=rng.generator("scm/time"))
    eps = torch.randn(x0.shape, generator=rng.generator("scm/noise")).double()
    t5 = t.view(2, 1, 1, 1, 1)
    x_t = (1 - t5) * x0 + t5 * eps
    clean = forcing.clean(x0)
    with torch.no_grad():
        v_c = forcing.velocity(teacher, x_t, t, cond, context=clean)
        v_u = forcing.velocity(teacher, x_t, t, negative.expand(2), context=clean)
        v_teacher = v_u + 3.0 * (v_c - v_u)
    h = 1e-6
    with torch.no_grad():
        ahead = forcing.velocity(student, x_t + h * v_teacher, t + h, cond, context=clean)
        behind = forcing.velocity(student, x_t - h * v_teacher, t - h, cond, context=clean)
    v = forcing.velocity(student, x_t, t, cond, context=clean)
    g = -(v.detach() - v_teacher) - 0.25 * t5 * (ahead - behind) / (2 * h)
    g_hat = g / (g.flatten(1).norm(dim=1) + 0.1).view(2, 1, 1, 1, 1)
    (v * (-200.0 * g_hat)).sum().div(2).backward()
    for a, p in zip(got, student.net.parameters(), strict=True):
        # noise is float32, the difference is of second order
        assert (a - p.grad).norm() <= 1e-5 * p.grad.norm()


def test_noisy_context_reaches_the_student_and_not_the_teacher(monkeypatch):
    """Causal_rCM.md section 5: student context noised to the last mid time from the start chunk on;
    the teacher always sees clean context.
    """
    seen = []
    student, teacher = gaussian_pair(WORLD)
    forcing = TeacherForcing(BlockPattern(3, 3))
    original = TeacherForcing.velocity

    def spy(self, denoiser, x_t, t, cond, *, context):
        seen.append(("teacher" if denoiser is teacher else "student", context.times[0].tolist()))
        return original(self, denoiser, x_t, t, cond, context=context)

    monkeypatch.setattr(TeacherForcing, "velocity", spy)
    method = TFDiscreteConsistency(
        student,
        teacher,
        grid=ConsistencyGrid(shift=3.0),
        forcing=forcing,
        context=ContextRule(True, 1),
        context_schedule=StepSchedule(((5 / 8,),)),
    )
    only_term(method)
    assert seen == [("teacher", [0.0] * 6), ("student", [0.0] * 3 + [5 / 8] * 3), ("student", [0.0] * 3 + [5 / 8] * 3)]


def test_joint_runs_both_on_one_student():
    student, teacher = gaussian_pair(WORLD)
    shared = {"forcing": FORCING}
    joint = Joint(
        "tf_dscm",
        TFDiscreteConsistency(student, teacher, grid=ConsistencyGrid(shift=3.0), **shared),
        TFContinuousConsistency(student, teacher, law=LAW, **shared),
    )
    names = [thunk().name for thunk in joint.terms(joint.phase(3), batch(), StepRng(0, 0, 0))]
    assert names == ["tf_dcm", "tf_scm"]
    other, _ = gaussian_pair(WORLD)
    with pytest.raises(ValueError, match="one student"):
        Joint("x", TFContinuousConsistency(other, teacher, law=LAW, **shared), joint.second)


def test_shapes_follow_the_world():
    assert batch().latents.shape == (2, 4, 6, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BackwardSimulation(0, LAW), "max_steps=0 must be at least 1"),
        (lambda: BackwardSimulation(2.0, LAW), "max_steps=2.0 must be a whole number"),
        (lambda: BackwardSimulation(4, LAW, (1.5, 1.4)), "at most one more than the times of fixed_taus"),
        (lambda: BackwardSimulation(3, LAW, (1.4, 1.5)), r"fixed_taus=\(1.4, 1.5\) must fall"),
        (lambda: BackwardSimulation(2, LAW, (1.6,)), r"must fall inside \(0, pi/2\)"),
        (lambda: BackwardSimulation(2, 5.0), "law=5.0 must be a TimeLaw"),
        (lambda: Alternation(1.5), "student_update_freq=1.5 must be a whole number"),
    ],
)
def test_simulations_and_phases_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
