"""Stage 2a, TF-dCM: discrete consistency under teacher forcing (Causal-rCM eq. 10; Causal_rCM.md
section 4).

A guided causal teacher on clean context is distilled into a student that predicts x0 in one jump
from any time. The target network is the live student without gradient; there is no EMA target.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.interpolant import rf_euler, rf_noise, rf_x0
from rcm.diffusion.time_sampling import ConsistencyGrid
from rcm.losses.dcm import causal_dcm
from rcm.losses.term import LossTerm
from rcm.methods.base import Phase, Thunk
from rcm.methods.draws import draw_noise
from rcm.methods.teacher_forcing import TeacherForcedConsistency
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.velocity_model import VelocityModel


class TFDiscreteConsistency(TeacherForcedConsistency):
    """`tf_dcm`: the student at t_0 against itself one teacher step (or `grid.skip` steps) earlier
    (Causal_rCM.md section 4).
    """

    name = "tf_dcm"

    def __init__(
        self, student: Denoiser, teacher: VelocityModel, *, grid: ConsistencyGrid, **shared: Any
    ) -> None:
        super().__init__(student, teacher, **shared)
        self.grid = grid

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """One consistency term."""
        yield lambda: self._term(batch, rng)

    def _term(self, batch: LatentBatch, rng: StepRng) -> LossTerm:
        x0, cond, forcing = batch.latents, batch.condition(), self.forcing
        times = self.grid.sample(x0.shape[0], generator=rng.generator("dcm/time")).to(x0.device)
        x_t = rf_noise(x0, draw_noise(rng, "dcm/noise", x0.shape, x0.device), times[:, :1])
        with torch.no_grad():
            target = self._target(x_t, times, x0, cond, rng)
        v = forcing.velocity(
            self.student,
            x_t,
            times[:, :1],
            cond,
            context=self.student_context(x0, rng, "dcm/context"),
        )
        return causal_dcm(
            rf_x0(x_t, v, times[:, :1]),
            target,
            loss_scale=self.loss_scale,
            nonfinite=self.nonfinite,
            name=self.name,
        )

    def _target(
        self,
        x_t: torch.Tensor,
        times: torch.Tensor,
        x0: torch.Tensor,
        cond: Condition,
        rng: StepRng,
    ) -> torch.Tensor:
        """Teacher Euler steps along `times` on clean context, then the live student's data
        prediction at the last time.
        """
        clean = self.forcing.clean(x0)
        for k in range(times.shape[1] - 1):
            t, t_next = times[:, k : k + 1], times[:, k + 1 : k + 2]
            x_t = rf_euler(
                x_t, self.forcing.velocity(self.teacher, x_t, t, cond, context=clean), t, t_next
            )
        context = self.student_context(x0, rng, "dcm/target_context")
        return rf_x0(
            x_t,
            self.forcing.velocity(self.student, x_t, times[:, -1:], cond, context=context),
            times[:, -1:],
        )
