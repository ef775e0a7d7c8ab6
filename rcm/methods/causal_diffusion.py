"""Stage 1: velocity regression with a causal network, by teacher forcing or diffusion forcing; and
its bidirectional form.

Teacher forcing (Causal-rCM eq. 8-9): one time per video, clean past as context. Diffusion forcing:
the noisy past itself is the context, with its own time per block. Bidirectional: one time, full
attention; it makes the teacher of toy runs and fine-tunes Wan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.interpolant import rf_noise
from rcm.diffusion.time_sampling import BlockStrategy, TimeLaw, block_times
from rcm.losses.denoising import TimeWeight, diffusion_loss
from rcm.losses.term import LossTerm, NonFinitePolicy
from rcm.methods.base import Phase, StudentOnly, Thunk
from rcm.methods.draws import draw_noise, draw_times
from rcm.methods.teacher_forcing import StudentContext, TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.rollout.plan import ContextRule, StepSchedule


class _VelocityRegression(StudentOnly, ABC):
    """Shared frame of the three forms: one student, one term; subclasses draw times and run the
    network.
    """

    name: str

    def __init__(
        self,
        student: Denoiser,
        *,
        law: TimeLaw,
        weight: TimeWeight | None,
        loss_scale: float,
        nonfinite: NonFinitePolicy = "propagate",
    ) -> None:
        self.student, self.law, self.weight, self.loss_scale = student, law, weight, loss_scale
        self.nonfinite = nonfinite

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """One regression of v onto eps - x0."""
        yield lambda: self._term(batch, rng)

    def _term(self, batch: LatentBatch, rng: StepRng) -> LossTerm:
        x0 = batch.latents
        t = self._times(x0, rng)
        eps = draw_noise(rng, "noise", x0.shape, x0.device)
        v = self._velocity(rf_noise(x0, eps, t), t, x0, batch.condition(), rng)
        how: dict[str, Any] = {"weight": self.weight, "loss_scale": self.loss_scale}
        return diffusion_loss(v, x0, eps, t, **how, nonfinite=self.nonfinite, name=self.name)

    def _times(self, x0: torch.Tensor, rng: StepRng) -> torch.Tensor:
        return draw_times(rng, "time", self.law, batch=x0.shape[0], device=x0.device)

    @abstractmethod
    def _velocity(
        self, x_t: torch.Tensor, t: torch.Tensor, x0: torch.Tensor, cond: Condition, rng: StepRng
    ) -> torch.Tensor: ...


class BidirectionalDiffusion(_VelocityRegression):
    """Ordinary flow matching over whole videos with full attention."""

    name = "diffusion"

    def _velocity(
        self, x_t: torch.Tensor, t: torch.Tensor, x0: torch.Tensor, cond: Condition, rng: StepRng
    ) -> torch.Tensor:
        layout = TokenLayout.bidirectional(
            x_t.shape[2], grid=self.student.token_grid(x_t.shape[3], x_t.shape[4])
        )
        return self.student.velocity(x_t, t, cond, layout)


class TeacherForcedDiffusion(_VelocityRegression):
    """`tf`: packed [x0 at 0; x_t at t], one time per video shared by its blocks; the release
    weights it with the Gaussian bell.

    Where `context` applies, the first half is noised to the last time of `context_schedule` instead
    (Causal_rCM.md section 5).
    """

    name = "tf"

    def __init__(
        self,
        student: Denoiser,
        *,
        forcing: TeacherForcing,
        context: ContextRule = ContextRule(),
        context_schedule: StepSchedule | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.forcing, self.context = forcing, StudentContext(context, context_schedule)

    def _velocity(
        self, x_t: torch.Tensor, t: torch.Tensor, x0: torch.Tensor, cond: Condition, rng: StepRng
    ) -> torch.Tensor:
        context = self.context.of(x0, forcing=self.forcing, rng=rng, purpose="context")
        return self.forcing.velocity(self.student, x_t, t, cond, context=context)


class DiffusionForcing(_VelocityRegression):
    """`df`: T frames under the block-causal mask with a time per block ("random", "same" or
    "fopp"), weight 1 by default.
    """

    name = "df"

    def __init__(
        self,
        student: Denoiser,
        *,
        pattern: BlockPattern,
        strategy: BlockStrategy,
        window: int | None = None,
        sinks: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.pattern, self.strategy, self.window, self.sinks = pattern, strategy, window, sinks

    def _times(self, x0: torch.Tensor, rng: StepRng) -> torch.Tensor:
        times = block_times(
            self.law,
            strategy=self.strategy,
            batch=x0.shape[0],
            pattern=self.pattern,
            num_frames=x0.shape[2],
            generator=rng.generator("time"),
        )
        return times.to(x0.device)

    def _velocity(
        self, x_t: torch.Tensor, t: torch.Tensor, x0: torch.Tensor, cond: Condition, rng: StepRng
    ) -> torch.Tensor:
        grid = self.student.token_grid(x_t.shape[3], x_t.shape[4])
        layout = TokenLayout.block_causal(
            x_t.shape[2], grid=grid, pattern=self.pattern, window=self.window, sinks=self.sinks
        )
        return self.student.velocity(x_t, t, cond, layout)
