"""What teacher-forced methods share: passes over a context, packed for gradients and context-cached
for tangents; the student's context; the roles of consistency (Causal_rCM.md sections 2, 5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.interpolant import rf_noise
from rcm.diffusion.time_sampling import TimeLaw
from rcm.losses.scm import warmup_ratio
from rcm.losses.term import LossTerm, NonFinitePolicy
from rcm.methods.base import Phase, StudentOnly, Thunk
from rcm.methods.draws import draw_noise
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.nets.velocity_model import VelocityModel
from rcm.rollout.plan import ContextRule, StepSchedule


@dataclass(frozen=True)
class Context:
    """What the noisy half is conditioned on: latents [B, C, T, H, W] and the RF time of every
    frame, float64 [B, T] (0 = clean).
    """

    latents: torch.Tensor
    times: torch.Tensor


@dataclass(frozen=True)
class TeacherForcing:
    """Block structure of teacher-forced passes: pattern, and optionally a window and sinks in
    blocks.
    """

    pattern: BlockPattern
    window: int | None = None
    sinks: int = 0

    def clean(self, x0: torch.Tensor) -> Context:
        """Clean context: the data at time 0."""
        return Context(
            x0, torch.zeros(x0.shape[0], x0.shape[2], dtype=torch.float64, device=x0.device)
        )

    def noisy(
        self,
        x0: torch.Tensor,
        *,
        rule: ContextRule,
        schedule: StepSchedule,
        rng: StepRng,
        purpose: str,
    ) -> Context:
        """Context noised with fresh noise where `rule` applies, to the last time of each block's
        schedule; clean elsewhere (Causal_rCM.md section 5).
        """
        blocks = self.pattern.block_of_frame(x0.shape[2])
        per_frame = [
            schedule.context_time(block) if rule.applies(block) else 0.0 for block in blocks
        ]
        times = (
            torch.tensor(per_frame, dtype=torch.float64, device=x0.device)
            .expand(x0.shape[0], -1)
            .contiguous()
        )
        return Context(rf_noise(x0, draw_noise(rng, purpose, x0.shape, x0.device), times), times)

    def velocity(
        self,
        denoiser: VelocityModel,
        x_t: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
        *,
        context: Context,
        s: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity of the noisy half [B, C, T, H, W] from one packed [context; noisy] pass; t is RF
        [B, 1] or [B, T]. With `s`, shaped as t, its mean from t down to s; the context stays at its
        own times.
        """
        num_frames = x_t.shape[2]
        packed = torch.cat([context.latents.to(x_t.dtype), x_t], dim=2)
        times = torch.cat([context.times, t.expand(-1, num_frames)], dim=1)
        layout = TokenLayout.teacher_forcing(num_frames, **self._structure(denoiser, x_t))
        if s is None:
            return denoiser.velocity(packed, times, cond, layout)
        ends = torch.cat([context.times, s.expand(-1, num_frames)], dim=1)
        return denoiser.mean_velocity(packed, times, ends, cond, layout)

    def tangent(
        self,
        denoiser: Denoiser,
        x_t: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
        *,
        context: Context,
        x_dot: torch.Tensor,
        t_dot: torch.Tensor,
        s: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity of the noisy half and its derivative along (x_dot, t_dot), both constants; with
        `s` those of the mean velocity down to it, at fixed s: t - s moves with t.

        The clean half attends to clean tokens only and its times do not move, so its tangent is
        exactly zero: it runs once, plainly, into a context cache, and tangents exist for the noisy
        half alone (Causal-rCM section 3.2; same numbers as the packed dual pass).
        """
        num_frames = x_t.shape[2]
        structure = self._structure(denoiser, x_t)
        cache = denoiser.new_cache(num_frames=num_frames, grid=structure["grid"])
        with torch.no_grad():
            layout = TokenLayout.context(num_frames, **structure)
            denoiser.enter_context(
                context.latents.to(x_t.dtype), context.times, cond, layout, cache=cache.append()
            )
        layout = TokenLayout.noisy_over_context(num_frames, **structure)

        def field(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            if s is None:
                return denoiser.velocity(x, time, cond, layout, cache=cache.readonly())
            return denoiser.mean_velocity(x, time, s, cond, layout, cache=cache.readonly())

        return jvp(field, (x_t, t), (x_dot, t_dot))

    def _structure(self, denoiser: VelocityModel, x: torch.Tensor) -> dict:
        grid = denoiser.token_grid(x.shape[3], x.shape[4])
        return {"grid": grid, "pattern": self.pattern, "window": self.window, "sinks": self.sinks}


@dataclass(frozen=True)
class StudentContext:
    """The context a student is trained on: clean, or noised where `rule` applies to the last times
    of `schedule` (Causal_rCM.md section 5).

    Raises `ConfigError` for a noisy rule without a schedule.
    """

    rule: ContextRule = ContextRule()
    schedule: StepSchedule | None = None

    def __post_init__(self) -> None:
        if self.rule.noisy and self.schedule is None:
            raise ConfigError(
                "noisy context in teacher forcing needs context_schedule: its times come from"
                " model.config.backward_timesteps"
            )

    def of(
        self, x0: torch.Tensor, *, forcing: TeacherForcing, rng: StepRng, purpose: str
    ) -> Context:
        """Context of the data `x0`; noise is drawn for `purpose`."""
        if self.schedule is None or not self.rule.noisy:
            return forcing.clean(x0)
        return forcing.noisy(x0, rule=self.rule, schedule=self.schedule, rng=rng, purpose=purpose)


class TeacherForcedConsistency(StudentOnly):
    """Roles of TF-dCM and TF-sCM: student, guided causal teacher (always on clean context), block
    structure, the student's context.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: VelocityModel,
        *,
        forcing: TeacherForcing,
        loss_scale: float = 100.0,
        context: ContextRule = ContextRule(),
        context_schedule: StepSchedule | None = None,
        nonfinite: NonFinitePolicy = "propagate",
    ) -> None:
        self.student, self.teacher, self.forcing, self.loss_scale = (
            student,
            teacher,
            forcing,
            loss_scale,
        )
        self.context, self.nonfinite = StudentContext(context, context_schedule), nonfinite

    def student_context(self, x0: torch.Tensor, rng: StepRng, purpose: str) -> Context:
        """What the student is conditioned on in this step."""
        return self.context.of(x0, forcing=self.forcing, rng=rng, purpose=purpose)


class TeacherForcedTangent(TeacherForcedConsistency, ABC):
    """What TF-sCM and TF-MeanFlow add: times from `law`, and a tangent that grows over
    `tangent_warmup` iterations of the trainer.
    """

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
        """One term; the warm-up ratio follows the trainer iteration."""
        yield lambda: self._term(
            batch, rng, warmup_ratio(phase.iteration, warmup_steps=self.tangent_warmup)
        )

    @abstractmethod
    def _term(self, batch: LatentBatch, rng: StepRng, warmup: float) -> LossTerm: ...
