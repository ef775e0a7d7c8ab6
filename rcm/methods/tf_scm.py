"""Stage 2b, TF-sCM: continuous consistency under teacher forcing (Causal-rCM eq. 15-19;
Causal_rCM.md section 5).

Roles are those of TF-dCM (`tf_dcm.py`); the teacher's step is replaced by the derivative along its
ODE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.interpolant import rf_noise
from rcm.diffusion.time_sampling import TimeLaw
from rcm.losses.scm import normalise, rf_tangent, scm_regression, warmup_ratio
from rcm.losses.term import LossTerm
from rcm.methods.base import Phase, Thunk
from rcm.methods.draws import draw_noise, draw_times
from rcm.methods.teacher_forcing import TeacherForcedConsistency
from rcm.nets.denoiser import Denoiser
from rcm.nets.velocity_model import VelocityModel


class TFContinuousConsistency(TeacherForcedConsistency):
    """`tf_scm`: the tangent of the consistency function along the teacher's ODE, by exact forward
    mode (Causal_rCM.md section 5).

    g = -(v - V) - r t J with J the derivative of v in the direction (V, 1); the clean half carries
    no tangent.
    """

    name = "tf_scm"

    def __init__(
        self,
        student: Denoiser,
        teacher: VelocityModel,
        *,
        law: TimeLaw,
        tangent_warmup: int = 1000,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.law, self.tangent_warmup = law, tangent_warmup

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """One consistency term; the warm-up ratio follows the trainer iteration."""
        yield lambda: self._term(
            batch, rng, warmup_ratio(phase.iteration, warmup_steps=self.tangent_warmup)
        )

    def _term(self, batch: LatentBatch, rng: StepRng, warmup: float) -> LossTerm:
        x0, cond, forcing = batch.latents, batch.condition(), self.forcing
        t = draw_times(rng, "scm/time", self.law, batch=x0.shape[0], device=x0.device)
        x_t = rf_noise(x0, draw_noise(rng, "scm/noise", x0.shape, x0.device), t)
        context = self.student_context(x0, rng, "scm/context")
        with torch.no_grad():
            v_teacher = forcing.velocity(self.teacher, x_t, t, cond, context=forcing.clean(x0))
        _, v_dot = forcing.tangent(
            self.student,
            x_t,
            t,
            cond,
            context=context,
            x_dot=v_teacher.to(x_t.dtype),
            t_dot=torch.ones_like(t),
        )
        v = forcing.velocity(self.student, x_t, t, cond, context=context)
        g_hat = normalise(rf_tangent(v.detach(), v_teacher, v_dot, t, warmup=warmup))
        return scm_regression(
            v, g_hat, loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name
        )
