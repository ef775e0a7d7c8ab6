"""Stage 2c, TF-MeanFlow: a student of two times under teacher forcing (arXiv 2505.13447;
Causal_rCM.md section 5).

Roles are those of TF-sCM (`tf_scm.py`); the student, a network with `two_times`, learns jumps
between any two times.
"""

from __future__ import annotations

from typing import Any

import torch

from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.interpolant import rf_noise
from rcm.losses.meanflow import meanflow_residual
from rcm.losses.scm import normalise, scm_regression
from rcm.losses.term import LossTerm
from rcm.methods.draws import draw_end_times, draw_noise, draw_times
from rcm.methods.teacher_forcing import TeacherForcedTangent


class TFMeanFlow(TeacherForcedTangent):
    """`tf_meanflow`: the MeanFlow identity along the teacher's ODE, by exact forward mode in the
    direction (V, 1) at fixed s.

    t follows `law`; s = t in `equal_share` of the samples, elsewhere s is uniform on [0, t]. The
    clean half has s = t.
    """

    name = "tf_meanflow"

    def __init__(self, *roles: Any, equal_share: float = 0.25, **shared: Any) -> None:
        super().__init__(*roles, **shared)
        if not 0 <= equal_share < 1:
            raise ConfigError(
                f"equal_share={equal_share} must be in [0, 1): at 1 no mean velocity is ever"
                " trained"
            )
        self.equal_share = equal_share

    def _term(self, batch: LatentBatch, rng: StepRng, warmup: float) -> LossTerm:
        x0, cond, forcing = batch.latents, batch.condition(), self.forcing
        t = draw_times(rng, "meanflow/time", self.law, batch=x0.shape[0], device=x0.device)
        s = draw_end_times(rng, "meanflow/end", t, equal_share=self.equal_share)
        x_t = rf_noise(x0, draw_noise(rng, "meanflow/noise", x0.shape, x0.device), t)
        context = self.student_context(x0, rng, "meanflow/context")
        with torch.no_grad():
            v_teacher = forcing.velocity(self.teacher, x_t, t, cond, context=forcing.clean(x0))
        direction = {"x_dot": v_teacher.to(x_t.dtype), "t_dot": torch.ones_like(t)}
        _, u_dot = forcing.tangent(self.student, x_t, t, cond, context=context, s=s, **direction)
        u = forcing.velocity(self.student, x_t, t, cond, context=context, s=s)
        residual = normalise(meanflow_residual(u.detach(), v_teacher, u_dot, t, s, warmup=warmup))
        return scm_regression(
            u, residual, loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name
        )
