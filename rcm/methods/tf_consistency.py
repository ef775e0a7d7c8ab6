"""Stages 2a and 2b: teacher-forced consistency distillation, discrete (TF-dCM) and continuous (TF-sCM).

Both distil a causal teacher, guided, on clean context, into a student that predicts x0 in one jump from any time (Causal-rCM eq. 10,
15-19). The target network is the live student without gradient; there is no EMA target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.interpolant import rf_euler, rf_noise, rf_x0
from rcm.diffusion.time_sampling import ConsistencyGrid, TimeLaw
from rcm.losses.dcm import causal_dcm
from rcm.losses.scm import normalise, rf_tangent, scm_regression, warmup_ratio
from rcm.losses.term import LossTerm, NonFinitePolicy
from rcm.methods.base import Phase, Thunk, student_only
from rcm.methods.draws import draw_noise, draw_times
from rcm.methods.teacher_forcing import Context, TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.rollout.plan import ContextRule, StepSchedule


class _TeacherForcedConsistency:
    """What both forms share: student, guided causal teacher, block structure, and the student's context (clean, or noisy as in spec
    6.5).
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        forcing: TeacherForcing,
        loss_scale: float = 100.0,
        context: ContextRule = ContextRule(),
        context_schedule: StepSchedule | None = None,
        nonfinite: NonFinitePolicy = "propagate",
    ) -> None:
        self.student, self.teacher, self.forcing, self.loss_scale = student, teacher, forcing, loss_scale
        if context.noisy and context_schedule is None:
            raise ConfigError(
                "noisy context in teacher forcing needs context_schedule: its times come from model.config.backward_timesteps"
            )
        self.context, self.context_schedule, self.nonfinite = context, context_schedule, nonfinite

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """The student."""
        return {"student": self.student.net}

    def phase(self, iteration: int) -> Phase:
        """Always the student's turn."""
        return student_only(iteration)

    def _student_context(self, x0: torch.Tensor, rng: StepRng, purpose: str) -> Context:
        if not self.context.noisy:
            return self.forcing.clean(x0)
        return self.forcing.noisy(x0, rule=self.context, schedule=self.context_schedule, rng=rng, purpose=purpose)


class TFDiscreteConsistency(_TeacherForcedConsistency):
    """`tf_dcm`: the student at t_0 against itself one teacher step (or `grid.skip` steps) earlier (Causal_rCM.md section 4)."""

    name = "tf_dcm"

    def __init__(self, student: Denoiser, teacher: Denoiser, *, grid: ConsistencyGrid, **shared) -> None:
        super().__init__(student, teacher, **shared)
        self.grid = grid

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """One consistency term."""
        yield lambda: self._term(batch, rng)

    def _term(self, batch: LatentBatch, rng: StepRng) -> LossTerm:
        x0, cond, forcing = batch.latents, Condition(batch.text), self.forcing
        times = self.grid.sample(x0.shape[0], generator=rng.generator("dcm/time")).to(x0.device)
        x_t = rf_noise(x0, draw_noise(rng, "dcm/noise", x0.shape, x0.device), times[:, :1])
        with torch.no_grad():
            target = self._target(x_t, times, x0, cond, rng)
        v = forcing.velocity(self.student, x_t, times[:, :1], cond, context=self._student_context(x0, rng, "dcm/context"))
        return causal_dcm(rf_x0(x_t, v, times[:, :1]), target, loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name)

    def _target(self, x_t: torch.Tensor, times: torch.Tensor, x0: torch.Tensor, cond: Condition, rng: StepRng) -> torch.Tensor:
        """Teacher Euler steps along `times` on clean context, then the live student's data prediction at the last time."""
        clean = self.forcing.clean(x0)
        for k in range(times.shape[1] - 1):
            t, t_next = times[:, k : k + 1], times[:, k + 1 : k + 2]
            x_t = rf_euler(x_t, self.forcing.velocity(self.teacher, x_t, t, cond, context=clean), t, t_next)
        context = self._student_context(x0, rng, "dcm/target_context")
        return rf_x0(x_t, self.forcing.velocity(self.student, x_t, times[:, -1:], cond, context=context), times[:, -1:])


class TFContinuousConsistency(_TeacherForcedConsistency):
    """`tf_scm`: the tangent of the consistency function along the teacher's ODE, by exact forward mode (Causal_rCM.md section 5).

    g = -(v - V) - r t J with J the derivative of v in the direction (V, 1); the clean half carries no tangent.
    """

    name = "tf_scm"

    def __init__(self, student: Denoiser, teacher: Denoiser, *, law: TimeLaw, tangent_warmup: int = 1000, **shared) -> None:
        super().__init__(student, teacher, **shared)
        self.law, self.tangent_warmup = law, tangent_warmup

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """One consistency term; the warm-up ratio follows the trainer iteration."""
        yield lambda: self._term(batch, rng, warmup_ratio(phase.iteration, warmup_steps=self.tangent_warmup))

    def _term(self, batch: LatentBatch, rng: StepRng, warmup: float) -> LossTerm:
        x0, cond, forcing = batch.latents, Condition(batch.text), self.forcing
        t = draw_times(rng, "scm/time", self.law, batch=x0.shape[0], device=x0.device)
        x_t = rf_noise(x0, draw_noise(rng, "scm/noise", x0.shape, x0.device), t)
        context = self._student_context(x0, rng, "scm/context")
        with torch.no_grad():
            v_teacher = forcing.velocity(self.teacher, x_t, t, cond, context=forcing.clean(x0))
        _, v_dot = forcing.tangent(self.student, x_t, t, cond, context=context, x_dot=v_teacher.to(x_t.dtype), t_dot=torch.ones_like(t))
        v = forcing.velocity(self.student, x_t, t, cond, context=context)
        g_hat = normalise(rf_tangent(v.detach(), v_teacher, v_dot, t, warmup=warmup))
        return scm_regression(v, g_hat, loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name)
