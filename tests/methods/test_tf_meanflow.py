"""MeanFlow on a linear-Gaussian world whose flow map, and so whose mean velocity, is known, and on
a tiny network against independent recomputation.
"""

from __future__ import annotations

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.time import per_frame
from rcm.diffusion.time_sampling import LogNormal, UniformShift
from rcm.methods.base import Phase
from rcm.methods.draws import draw_end_times
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.methods.tf_meanflow import TFMeanFlow
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from tests.support.analytic import AnalyticDenoiser
from tests.support.linear_gaussian import LinearGaussian
from tests.support.tiny_nets import condition, latents, tiny_config, tiny_net

WORLD = LinearGaussian()
FORCING = TeacherForcing(BlockPattern(3, 3))
FIRST = Phase("student", 0, 0)
LAW = LogNormal(-0.8, 1.6)


class MeanDenoiser(AnalyticDenoiser):
    """mean_velocity = field(x, t, s) on the output frames of the layout, velocity that at s = t."""

    def velocity(self, x, t, cond, layout, *, cache=None):
        return self.mean_velocity(x, t, t, cond, layout, cache=cache)

    def mean_velocity(self, x, t, s, cond, layout, *, cache=None):
        start, stop = layout.output
        times = (per_frame(time, x).expand(-1, -1, x.shape[2], -1, -1)[:, :, start:stop] for time in (t, s))
        return self.field(x[:, :, start:stop], *times) + self.net.offset


def batch(x: torch.Tensor | None = None) -> LatentBatch:
    return LatentBatch(WORLD.mu + WORLD.s * latents(6) if x is None else x, condition(tiny_config()).text, ["a", "b"], ["0", "1"])


def only_term(method, data=None, phase=FIRST, rng=None):
    (thunk,) = method.terms(phase, data or batch(), rng or StepRng(0, 0, 0))
    return thunk()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_residual_vanishes_at_the_true_mean_velocity(share):
    """It is normalised with +0.1, so a vanishing one shows as a vanishing norm, a student off by
    0.1 as one near 1.
    """
    options = {"law": LAW, "equal_share": share, "tangent_warmup": 0, "forcing": FORCING}
    teacher = AnalyticDenoiser(WORLD.rf_velocity)
    right, wrong = MeanDenoiser(WORLD.rf_mean_velocity), MeanDenoiser(lambda *at: WORLD.rf_mean_velocity(*at) + 0.1)
    for step in range(4):
        rng = StepRng(0, step, 0)
        assert only_term(TFMeanFlow(right, teacher, **options), rng=rng).logs["tf_meanflow/g_hat_norm"] < 1e-4
        assert only_term(TFMeanFlow(wrong, teacher, **options), rng=rng).logs["tf_meanflow/g_hat_norm"] > 0.8


@pytest.mark.parametrize("warmup", [1.0, 0.25])
def test_gradient_is_the_papers(warmup):
    """-2 loss_scale residual / (||residual|| + 0.1) pulled back through u, with u_tgt = V - r (t -
    s) du/dt assembled here by hand, du/dt by a difference along (V, 1) at fixed s in packed passes.
    """
    student = Denoiser(tiny_net(seed=1, two_times=True), Precision.preset("fp64"))
    teacher = Denoiser(tiny_net(seed=2), Precision.preset("fp64"))
    law, phase = UniformShift(5.0), Phase("student", round(1000 * warmup), round(1000 * warmup))
    method = TFMeanFlow(student, teacher, law=law, equal_share=0.0, tangent_warmup=1000, forcing=FORCING)
    data, rng = batch(latents(6)), StepRng(3, 4, 0)
    only_term(method, data, phase, rng).value.backward()
    got = [p.grad.clone() for p in student.net.parameters()]
    student.net.zero_grad()

    x0, cond = data.latents, Condition(data.text)
    t = law.sample((2, 1), generator=rng.generator("meanflow/time"))
    s = torch.rand(2, 2, 1, generator=rng.generator("meanflow/end"), dtype=torch.float64)[1] * t
    eps = torch.randn(x0.shape, generator=rng.generator("meanflow/noise")).double()
    t5, span = t.view(2, 1, 1, 1, 1), (t - s).view(2, 1, 1, 1, 1)
    x_t, clean, h = (1 - t5) * x0 + t5 * eps, FORCING.clean(x0), 1e-6
    with torch.no_grad():
        v = FORCING.velocity(teacher, x_t, t, cond, context=clean)
        ahead = FORCING.velocity(student, x_t + h * v, t + h, cond, context=clean, s=s)
        behind = FORCING.velocity(student, x_t - h * v, t - h, cond, context=clean, s=s)
    u = FORCING.velocity(student, x_t, t, cond, context=clean, s=s)
    residual = v - warmup * span * (ahead - behind) / (2 * h) - u.detach()
    residual = residual / (residual.flatten(1).norm(dim=1) + 0.1).view(2, 1, 1, 1, 1)
    (u * (-200.0 * residual)).sum().div(2).backward()
    for a, p in zip(got, student.net.parameters(), strict=True):
        # noise is float32, the difference is of second order
        assert (a - p.grad).norm() <= 1e-5 * p.grad.norm()


def test_end_times_are_below_and_as_often_equal_as_asked():
    t = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = draw_end_times(StepRng(0, 0, 0), "end", t, equal_share=0.3)
    assert s.shape == t.shape and bool(((s >= 0) & (s <= t)).all())
    equal = s == t
    assert equal.double().mean() == pytest.approx(0.3, abs=0.015)
    ratio = (s / t)[~equal]
    assert (ratio.mean(), ratio.var()) == (pytest.approx(1 / 2, abs=0.01), pytest.approx(1 / 12, abs=0.004))
    assert not (draw_end_times(StepRng(0, 0, 0), "end", t, equal_share=0.0) == t).any()
    with pytest.raises(ConfigError, match=r"equal_share=1 must be in \[0, 1\)"):
        TFMeanFlow(MeanDenoiser(WORLD.rf_mean_velocity), None, law=LAW, equal_share=1, forcing=FORCING)
