"""Stage 3: self-forced distribution matching. The student rolls out its own video; teacher and fake
score judge it whole.

Teacher and fake score are bidirectional networks over the full video with one time per sample
(Causal-rCM eq. 7, 11-14; Causal_rCM.md section 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.interpolant import rf_noise, rf_x0
from rcm.diffusion.time_sampling import TimeLaw
from rcm.losses.denoising import causal_critic_loss
from rcm.losses.dmd import dmd_loss, dmd_target
from rcm.losses.term import LossTerm, NonFinitePolicy, together
from rcm.methods.adversary import HEAD, Adversary, Pull
from rcm.methods.base import Phase, Thunk
from rcm.methods.draws import draw_noise, draw_times
from rcm.methods.schedule import Alternation
from rcm.methods.self_rollout import OwnVideo, SelfRollout
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.nets.velocity_model import VelocityModel
from rcm.rollout.autoregressive import ChunkResult
from rcm.rollout.plan import ContextRule, StepSchedule
from rcm.rollout.replay import replay_chunk


class SelfForcedDMD:
    """`sf_dmd`: student phases move the rollout along the score difference, fake-score phases fit
    the critic to fresh rollouts.

    `schedule` gives the step counts per chunk (non-increasing); update k rolls out (k mod max) + 1
    steps. `replayed` recomputes one chunk at a time for the gradient: equal gradients, activation
    memory of one chunk. `rollout_frames`: rollouts of up to that many frames, of which a window is
    judged (`SelfRollout`). The latents of a batch give the shape only, but with an `adversary` on
    the fake score: they are its real videos.
    """

    name = "sf_dmd"

    def __init__(
        self,
        student: Denoiser,
        teacher: VelocityModel,
        fake_score: Denoiser,
        *,
        forcing: TeacherForcing,
        schedule: StepSchedule,
        law: TimeLaw,
        alternation: Alternation,
        context: ContextRule = ContextRule(),
        loss_scale: float = 1.0,
        replayed: bool = False,
        rollout_frames: int | None = None,
        adversary: Adversary | None = None,
        nonfinite: NonFinitePolicy = "propagate",
    ) -> None:
        schedule.require_non_increasing("model.config.sf_simulation_steps_per_chunk")
        self.student, self.teacher, self.fake_score = student, teacher, fake_score
        self.rollout = SelfRollout(student, forcing, schedule, context, rollout_frames)
        self.law, self.alternation, self.adversary = law, alternation, adversary
        self.loss_scale, self.replayed, self.nonfinite = loss_scale, replayed, nonfinite

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """Student and fake score, and the head of an adversary."""
        head = {} if self.adversary is None else {HEAD: self.adversary.head}
        return {"student": self.student.net, "fake_score": self.fake_score.net, **head}

    def phase(self, iteration: int) -> Phase:
        """1 student update, then student_update_freq - 1 fake-score updates, the head's with
        them.
        """
        phase = replace(self.alternation.phase(iteration), rollout=True)
        if self.adversary is None or phase.role != "fake_score":
            return phase
        return replace(phase, beside=(HEAD,))

    def terms(self, phase: Phase, batch: LatentBatch, rng: StepRng) -> Iterator[Thunk]:
        """Student phase: one term (plain) or one per chunk (replayed). Fake-score phase: one
        regression, an adversary's loss with it.
        """
        cond, like = batch.condition(), batch.latents
        if phase.role == "fake_score":
            yield lambda: self._critic_term(phase, cond, like, rng)
        elif not self.replayed:
            yield lambda: self._student_term(phase, cond, like, rng)
        else:
            yield from self._replayed_terms(phase, cond, like, rng)

    def _roll(
        self, phase: Phase, cond: Condition, like: torch.Tensor, rng: StepRng, *, grad: bool
    ) -> OwnVideo:
        return self.rollout(cond, like, rng, index=phase.index, grad=grad)

    def _student_term(
        self, phase: Phase, cond: Condition, like: torch.Tensor, rng: StepRng
    ) -> LossTerm:
        video = self._roll(phase, cond, like, rng, grad=True).video
        target, pull = self._judge(video, cond, rng)
        found = self._loss(video, target)
        return found if pull is None else together(found, pull.term(video))

    def _loss(self, video: torch.Tensor, target: torch.Tensor) -> LossTerm:
        return dmd_loss(
            video, target, loss_scale=self.loss_scale, nonfinite=self.nonfinite, name=self.name
        )

    def _replayed_terms(
        self, phase: Phase, cond: Condition, like: torch.Tensor, rng: StepRng
    ) -> Iterator[Thunk]:
        rolled = self._roll(phase, cond, like, rng, grad=False)
        target, pull = self._judge(rolled.video, cond, rng)
        # the step adds up the logs of its terms: the first one has the video's
        logs = self._loss(rolled.video, target).logs

        def term(chunk: ChunkResult, logs: Mapping[str, torch.Tensor]) -> LossTerm:
            x0 = replay_chunk(self.student, cond, chunk, canvas=rolled.canvas, cache=rolled.cache)
            frames, x0 = rolled.part(chunk.plan), rolled.judged(chunk.plan, x0)
            found = replace(self._loss(x0, target[:, :, frames]), logs=logs)
            return found if pull is None else together(found, pull.term(x0, frames))

        for chunk in rolled.chunks:
            yield partial(term, chunk, logs)
            logs = {}

    @torch.no_grad()
    def _judge(
        self, video: torch.Tensor, cond: Condition, rng: StepRng
    ) -> tuple[torch.Tensor, Pull | None]:
        """Pseudo-target of the whole video, G - (x0_fake - x0_teacher) / w at one time per sample,
        and what the adversary does to it, in one pass of the fake score.
        """
        t = draw_times(rng, "dmd/time", self.law, batch=video.shape[0], device=video.device)
        eps = draw_noise(rng, "dmd/noise", video.shape, video.device)
        y, pull = rf_noise(video, eps, t), None
        layout = self._whole(y)
        if self.adversary is None:
            v_fake = self.fake_score.velocity(y, t, cond, layout)
        else:
            v_fake, pull = self.adversary.pull(video, eps, t, cond, layout)
        x0_fake = rf_x0(y, v_fake, t)
        x0_teacher = rf_x0(y, self.teacher.velocity(y, t, cond, layout), t)
        return dmd_target(video, x0_fake, x0_teacher), pull

    def _critic_term(
        self, phase: Phase, cond: Condition, like: torch.Tensor, rng: StepRng
    ) -> LossTerm:
        video = self._roll(phase, cond, like, rng, grad=False).video
        t = draw_times(rng, "critic/time", self.law, batch=video.shape[0], device=video.device)
        eps = draw_noise(rng, "critic/noise", video.shape, video.device)
        y, layout = rf_noise(video, eps, t), self._whole(video)
        if self.adversary is None:
            v_fake = self.fake_score.velocity(y, t, cond, layout)
            return causal_critic_loss(v_fake, video, eps, nonfinite=self.nonfinite)
        v_fake, fake = self.adversary.look(y, t, cond, layout)
        # one backward pass: FSDP2 cannot hold back gradients of a pass that leaves blocks out
        return together(
            causal_critic_loss(v_fake, video, eps, nonfinite=self.nonfinite),
            self.adversary.critic_term(fake, like.to(video.dtype), t, cond, layout, rng),
        )

    def _whole(self, x: torch.Tensor) -> TokenLayout:
        return TokenLayout.bidirectional(
            x.shape[2], grid=self.fake_score.token_grid(x.shape[3], x.shape[4])
        )
