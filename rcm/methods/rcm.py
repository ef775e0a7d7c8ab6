"""Bidirectional rCM, the ancestor: consistency (continuous or discrete) plus distribution matching,
in TrigFlow time (Causal_rCM.md section 8; arXiv 2510.08431).

The student is a bidirectional network seen as a TrigFlow model through `Denoiser.trig_F`. Exact
forward mode and both difference schemes are values of `directional`; `rf_native` uses the
rectified-flow form of the tangent instead (Causal_rCM.md section 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from rcm.core.errors import ConfigError
from rcm.core.records import check_kinds
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.directional import Directional, Exact
from rcm.diffusion.interpolant import rf_noise, rf_x0, trig_euler, trig_noise, trig_x0
from rcm.diffusion.time import rf_to_trig
from rcm.diffusion.time_sampling import ConsistencyGrid, TimeLaw
from rcm.diffusion.wan_as_trigflow import rf_point
from rcm.losses.dcm import bidirectional_dcm
from rcm.losses.denoising import bidirectional_critic_loss
from rcm.losses.dmd import dmd_loss, dmd_target
from rcm.losses.scm import (
    TrigVariant,
    normalise,
    rf_tangent,
    scm_regression,
    trigflow_tangent,
    warmup_ratio,
)
from rcm.losses.term import LossTerm, NonFinitePolicy
from rcm.methods.base import Phase, StudentOnly, Thunk
from rcm.methods.draws import draw_noise, draw_times
from rcm.methods.schedule import Alternation
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.nets.velocity_model import VelocityModel


def _whole(denoiser: Denoiser, x: torch.Tensor) -> TokenLayout:
    return TokenLayout.bidirectional(x.shape[2], grid=denoiser.token_grid(x.shape[3], x.shape[4]))


class ContinuousConsistency(StudentOnly):
    """sCM over whole videos: TrigFlow form by default, RF form with `rf_native` (Causal_rCM.md
    section 8).

    `law` is the RF-time law p_G. `directional` computes the derivative along the teacher's ODE.
    `teacher` carries the guidance.
    """

    name = "scm"

    def __init__(
        self,
        student: Denoiser,
        teacher: VelocityModel,
        *,
        law: TimeLaw,
        directional: Directional = Exact(),
        rf_native: bool = False,
        variant: TrigVariant = "paper",
        tangent_warmup: int = 0,
        loss_scale: float = 100.0,
        nonfinite: NonFinitePolicy = "propagate",
    ) -> None:
        self.student, self.teacher, self.law, self.directional = student, teacher, law, directional
        self.rf_native, self.variant, self.tangent_warmup = rf_native, variant, tangent_warmup
        self.loss_scale, self.nonfinite = loss_scale, nonfinite

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """One consistency term."""
        form = self._rf_term if self.rf_native else self._trig_term
        yield lambda: form(
            batch, rng, warmup_ratio(phase.iteration, warmup_steps=self.tangent_warmup)
        )

    def _trig_term(self, batch: LatentBatch, rng: StepRng, warmup: float) -> LossTerm:
        x0, cond = batch.latents, batch.condition()
        tau = rf_to_trig(draw_times(rng, "scm/time", self.law, batch=x0.shape[0], device=x0.device))
        x = trig_noise(x0, draw_noise(rng, "scm/noise", x0.shape, x0.device), tau)
        layout = _whole(self.student, x)
        with torch.no_grad():
            F_teacher = self.teacher.trig_F(x, tau, cond, layout)
        cs = torch.cos(tau) * torch.sin(tau)
        jvp_cs = self.directional(
            lambda a, s: self.student.trig_F(a, s, cond, layout),
            x,
            tau,
            velocity=F_teacher,
            scale=cs,
        )
        F = self.student.trig_F(x, tau, cond, layout)
        g = trigflow_tangent(
            F.detach(), F_teacher, jvp_cs, x, tau, warmup=warmup, variant=self.variant
        )
        return scm_regression(
            F, normalise(g), loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name
        )

    def _rf_term(self, batch: LatentBatch, rng: StepRng, warmup: float) -> LossTerm:
        x0, cond = batch.latents, batch.condition()
        t = draw_times(rng, "scm/time", self.law, batch=x0.shape[0], device=x0.device)
        x = rf_noise(x0, draw_noise(rng, "scm/noise", x0.shape, x0.device), t)
        layout = _whole(self.student, x)
        with torch.no_grad():
            v_teacher = self.teacher.velocity(x, t, cond, layout)
        v_dot = self.directional(
            lambda a, s: self.student.velocity(a, s, cond, layout), x, t, velocity=v_teacher
        )
        v = self.student.velocity(x, t, cond, layout)
        g_hat = normalise(rf_tangent(v.detach(), v_teacher, v_dot, t, warmup=warmup))
        return scm_regression(
            v, g_hat, loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name
        )


class DiscreteConsistency(StudentOnly):
    """dCM over whole videos: Euler steps of the teacher in TrigFlow time, target = live student
    without gradient (Causal_rCM.md section 8).
    """

    name = "dcm"

    def __init__(
        self,
        student: Denoiser,
        teacher: VelocityModel,
        *,
        grid: ConsistencyGrid,
        loss_scale: float = 100.0,
        nonfinite: NonFinitePolicy = "propagate",
    ) -> None:
        self.student, self.teacher, self.grid, self.loss_scale, self.nonfinite = (
            student,
            teacher,
            grid,
            loss_scale,
            nonfinite,
        )

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """One consistency term."""
        yield lambda: self._term(batch, rng)

    def _term(self, batch: LatentBatch, rng: StepRng) -> LossTerm:
        x0, cond = batch.latents, batch.condition()
        taus = rf_to_trig(
            self.grid.sample(x0.shape[0], generator=rng.generator("dcm/time")).to(x0.device)
        )
        x = trig_noise(x0, draw_noise(rng, "dcm/noise", x0.shape, x0.device), taus[:, :1])
        layout = _whole(self.student, x)
        with torch.no_grad():
            y = x
            for k in range(taus.shape[1] - 1):
                tau, tau_next = taus[:, k : k + 1], taus[:, k + 1 : k + 2]
                y = trig_euler(y, self.teacher.trig_F(y, tau, cond, layout), tau, tau_next)
            target = self._data(y, taus[:, -1:], cond, layout)
        prediction = self._data(x, taus[:, :1], cond, layout)
        return bidirectional_dcm(
            prediction, target, loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name
        )

    def _data(
        self, x_tau: torch.Tensor, tau: torch.Tensor, cond: Condition, layout: TokenLayout
    ) -> torch.Tensor:
        """The consistency function in its RF form x_t - t v: no division by sin tau."""
        x_t, t = rf_point(x_tau, tau)
        return rf_x0(x_t, self.student.velocity(x_t, t, cond, layout), t)


@dataclass(frozen=True)
class BackwardSimulation:
    """The student's own few-step sample in TrigFlow time (Causal_rCM.md section 8): n = index mod
    max_steps + 1 steps from pure noise, gradient in the last.

    `fixed_taus` gives the later times (radians), falling inside (0, pi/2); None draws them from
    `law`, each at most the one before. Raises `ConfigError` for other times, or too few.
    """

    max_steps: int
    law: TimeLaw
    fixed_taus: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        taus = self.fixed_taus
        if self.max_steps < 1 or (taus is not None and len(taus) < self.max_steps - 1):
            raise ConfigError(
                f"max_steps={self.max_steps} must be at least 1, and at most one more than the"
                f" times of fixed_taus={taus}"
            )
        if taus is not None and not all(a > b for a, b in pairwise((torch.pi / 2, *taus, 0.0))):
            raise ConfigError(f"fixed_taus={taus} must fall inside (0, pi/2)")

    def __call__(
        self,
        student: Denoiser,
        cond: Condition,
        shape: torch.Size,
        rng: StepRng,
        *,
        index: int,
        grad: bool,
    ) -> torch.Tensor:
        """Data prediction [B, C, T, H, W] at the end of the simulation."""
        device, batch = cond.text.device, shape[0]
        num_steps = index % self.max_steps + 1
        tau = torch.full((batch, 1), torch.pi / 2, dtype=torch.float64, device=device)
        x = draw_noise(rng, "simulation/noise0", shape, device)
        layout = _whole(student, x)
        for step in range(num_steps):
            last = step == num_steps - 1
            with torch.set_grad_enabled(grad and last):
                x0 = trig_x0(x, student.trig_F(x, tau, cond, layout), tau)
            if last:
                return x0
            tau = self._next(tau, step, rng)
            x = trig_noise(x0, draw_noise(rng, f"simulation/noise{step + 1}", shape, device), tau)
        raise AssertionError("max_steps >= 1")

    def _next(self, tau: torch.Tensor, step: int, rng: StepRng) -> torch.Tensor:
        if self.fixed_taus is not None:
            return torch.full_like(tau, self.fixed_taus[step])
        drawn = rf_to_trig(
            draw_times(
                rng, f"simulation/time{step + 1}", self.law, batch=tau.shape[0], device=tau.device
            )
        )
        return torch.minimum(drawn, tau)


class DistributionMatching:
    """DMD over whole videos with a trained fake score (Causal_rCM.md section 8). Before
    `alternation.warmup` it adds nothing to the student.
    """

    name = "dmd"

    def __init__(
        self,
        student: Denoiser,
        teacher: VelocityModel,
        fake_score: Denoiser,
        *,
        law: TimeLaw,
        simulation: BackwardSimulation,
        alternation: Alternation,
        loss_scale: float = 1.0,
        nonfinite: NonFinitePolicy = "propagate",
    ) -> None:
        self.student, self.teacher, self.fake_score = student, teacher, fake_score
        self.law, self.simulation, self.alternation = law, simulation, alternation
        self.loss_scale, self.nonfinite = loss_scale, nonfinite

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """Student and fake score."""
        return {"student": self.student.net, "fake_score": self.fake_score.net}

    def phase(self, iteration: int) -> Phase:
        """Student alone during the warm-up, then alternating."""
        return self.alternation.phase(iteration)

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """Student: one DMD term once the warm-up is over. Fake score: one regression."""
        cond, shape = batch.condition(), batch.latents.shape
        if phase.role == "fake_score":
            yield lambda: self._critic_term(phase, cond, shape, rng)
        elif phase.iteration >= self.alternation.warmup:
            yield lambda: self._student_term(phase, cond, shape, rng)

    def _student_term(
        self, phase: Phase, cond: Condition, shape: torch.Size, rng: StepRng
    ) -> LossTerm:
        video = self.simulation(self.student, cond, shape, rng, index=phase.index, grad=True)
        tau, y = self._renoise(video.detach(), rng, "dmd")
        with torch.no_grad():
            layout = _whole(self.student, y)
            x0_fake = trig_x0(y, self.fake_score.trig_F(y, tau, cond, layout), tau)
            x0_teacher = trig_x0(y, self.teacher.trig_F(y, tau, cond, layout), tau)
        target = dmd_target(video, x0_fake, x0_teacher)
        return dmd_loss(
            video, target, loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name
        )

    def _critic_term(
        self, phase: Phase, cond: Condition, shape: torch.Size, rng: StepRng
    ) -> LossTerm:
        with torch.no_grad():
            video = self.simulation(self.student, cond, shape, rng, index=phase.index, grad=False)
        tau, y = self._renoise(video, rng, "critic")
        x_t, t = rf_point(y, tau)
        v_fake = self.fake_score.velocity(x_t, t, cond, _whole(self.fake_score, y))
        eps = draw_noise(rng, "critic/noise", video.shape, video.device)
        return bidirectional_critic_loss(v_fake, video, eps, tau, nonfinite=self.nonfinite)

    def _renoise(
        self, video: torch.Tensor, rng: StepRng, purpose: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tau = rf_to_trig(
            draw_times(rng, f"{purpose}/time", self.law, batch=video.shape[0], device=video.device)
        )
        return tau, trig_noise(
            video, draw_noise(rng, f"{purpose}/noise", video.shape, video.device), tau
        )
