"""Self-forced DMD on tiny networks: replay equals plain, phases, targets; and the same for
bidirectional DMD's schedule.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.time_sampling import UniformShift
from rcm.methods.base import Phase
from rcm.methods.rcm import BackwardSimulation, DistributionMatching
from rcm.methods.schedule import Alternation
from rcm.methods.sf_dmd import SelfForcedDMD
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.denoiser import Denoiser, Guided
from rcm.rollout.plan import ContextRule, StepSchedule
from tests.support.tiny_nets import PATTERNS, condition, latents, tiny_config, tiny_net

FOUR, TWO = (15 / 16, 5 / 6, 5 / 8), (5 / 6,)


def nets():
    fp64 = Precision.preset("fp64")
    student, teacher, fake = (Denoiser(tiny_net(seed=s), fp64) for s in (1, 2, 3))
    teacher.eval_params()
    return student, Guided(teacher, condition(tiny_config(), batch=1, seed=11), 5.0), fake


def method(name="c3-3", *, schedule=(FOUR, TWO), **options):
    return SelfForcedDMD(
        *nets(),
        forcing=TeacherForcing(BlockPattern.parse(name)),
        schedule=StepSchedule(schedule),
        law=UniformShift(5.0),
        alternation=Alternation(6),
        **options,
    )


def batch(name="c3-3"):
    return LatentBatch(latents(PATTERNS[name]), condition(tiny_config()).text, ["a", "b"], ["0", "1"])


def gradients(m, phase, name="c3-3"):
    role = m.trainable[phase.role]
    for thunk in m.terms(phase, batch(name), StepRng(0, 7, 0)):
        thunk().value.backward()
    return {key: p.grad.clone() for key, p in role.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("context", [ContextRule(), ContextRule(True, 1)])
@pytest.mark.parametrize("index", [0, 3])
def test_replayed_gradients_equal_plain_ones(name, context, index):
    phase, schedule = Phase("student", index, index), (FOUR, (5 / 8,))
    plain = gradients(method(name, context=context, schedule=schedule), phase, name)
    replayed = gradients(method(name, context=context, schedule=schedule, replayed=True), phase, name)
    assert plain.keys() == replayed.keys() and sum(g.norm() for g in plain.values()) > 0
    for key in plain:
        torch.testing.assert_close(replayed[key], plain[key], rtol=1e-9, atol=1e-9)


def test_student_phase_leaves_the_other_roles_alone():
    m = method()
    gradients(m, Phase("student", 1, 6))
    assert all(p.grad is None for p in m.fake_score.net.parameters())
    m = method()
    gradients(m, Phase("fake_score", 0, 1))
    assert all(p.grad is None for p in m.student.net.parameters())
    assert any(p.grad is not None for p in m.fake_score.net.parameters())


def test_student_gradient_is_the_score_difference_pulled_back():
    """2 (x0_fake - x0_teacher) / w through the rollout, with guidance assembled here by hand."""
    m, phase, rng, data = method(), Phase("student", 2, 12), StepRng(0, 7, 0), batch()
    got = gradients(m, phase)
    m.student.net.zero_grad()
    cond = condition(tiny_config())
    rolled = m._roll(phase, cond, data.latents, rng, grad=True)
    video = rolled.video
    t = UniformShift(5.0).sample((2, 1), generator=rng.generator("dmd/time")).view(2, 1, 1, 1, 1)
    eps = torch.randn(video.shape, generator=rng.generator("dmd/noise")).double()
    y = ((1 - t) * video + t * eps).detach()
    layout = m._whole(y)
    with torch.no_grad():
        raw, negative = m.teacher.denoiser, m.teacher.negative.expand(2)
        at = t.view(2, 1)
        v_u, v_c = raw.velocity(y, at, negative, layout), raw.velocity(y, at, cond, layout)
        x0_teacher = y - t * (v_u + 5.0 * (v_c - v_u))
        x0_fake = y - t * m.fake_score.velocity(y, at, cond, layout)
    w = (video.detach() - x0_teacher).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
    (video * 2 * (x0_fake - x0_teacher) / w).sum().div(2).backward()
    for key, p in m.student.net.named_parameters():
        if key in got:
            assert (got[key] - p.grad).norm() <= 1e-5 * p.grad.norm()  # the noise is float32


def test_phases_are_one_student_then_five_critics():
    m = method()
    roles = [m.phase(i) for i in range(13)]
    assert [p.role == "student" for p in roles] == [i % 6 == 0 for i in range(13)]
    assert [p.index for p in roles] == [0, 0, 1, 2, 3, 4, 1, 5, 6, 7, 8, 9, 2]
    warm = [Alternation(5, warmup=3).phase(i) for i in range(9)]
    assert [(p.role, p.index) for p in warm] == [
        ("student", 0), ("student", 1), ("student", 2), ("student", 3), ("fake_score", 0), ("fake_score", 1),
        ("fake_score", 2), ("fake_score", 3), ("student", 4),
    ]  # fmt: skip


def test_growing_step_counts_are_refused():
    with pytest.raises(ConfigError, match="sf_simulation_steps_per_chunk"):
        method(schedule=(TWO, FOUR))


def test_bidirectional_dmd_waits_for_the_warm_up_and_cycles_its_rollout():
    student, teacher, fake = nets()
    law = UniformShift(5.0)
    lengths = []
    simulation = BackwardSimulation(4, law, fixed_taus=(1.5, 1.4, 1.0))
    m = DistributionMatching(student, teacher, fake, law=law, simulation=simulation, alternation=Alternation(5, warmup=2))
    assert list(m.terms(m.phase(0), batch(), StepRng(0, 0, 0))) == []
    original = student.trig_F

    def counting(x, tau, cond, layout, **rest):
        lengths.append(tau[0, 0].item())
        return original(x, tau, cond, layout, **rest)

    student.trig_F = counting
    for index in range(3):
        lengths.clear()
        simulation(student, condition(tiny_config()), batch().latents.shape, StepRng(0, index, 0), index=index, grad=False)
        assert lengths == pytest.approx([torch.pi / 2, 1.5, 1.4, 1.0][: index + 1])
    assert len(list(m.terms(m.phase(2), batch(), StepRng(0, 2, 0)))) == 1
    drawn = BackwardSimulation(4, law)
    lengths.clear()
    drawn(student, condition(tiny_config()), batch().latents.shape, StepRng(0, 3, 0), index=3, grad=False)
    assert len(lengths) == 4 and all(a >= b for a, b in pairwise(lengths))
