"""Stage 2b, TF-sCM: continuous consistency under teacher forcing (Causal-rCM eq. 15-19;
Causal_rCM.md section 5).

Roles are those of TF-dCM (`tf_dcm.py`); the teacher's step is replaced by the derivative along its
ODE.
"""

from __future__ import annotations

import torch

from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.interpolant import rf_noise
from rcm.losses.scm import normalise, rf_tangent, scm_regression
from rcm.losses.term import LossTerm
from rcm.methods.draws import draw_noise, draw_times
from rcm.methods.teacher_forcing import TeacherForcedTangent


class TFContinuousConsistency(TeacherForcedTangent):
    """`tf_scm`: the tangent of the consistency function along the teacher's ODE, by exact forward
    mode (Causal_rCM.md section 5).

    g = -(v - V) - r t J with J the derivative of v in the direction (V, 1); the clean half carries
    no tangent.
    """

    name = "tf_scm"

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
