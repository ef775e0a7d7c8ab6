"""A discriminator inside the fake score: the optional GAN term of self-forced DMD (Causal_rCM.md
section 6; DMD2, arXiv 2405.14867).

It looks at a noised video as the fake score does, at one time per sample, with the same condition,
and says from the tokens behind some blocks whether the video is real. Its loss trains these blocks
with the head; the student gets its gradient beside the one of DMD.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from rcm.core.records import Record, within
from rcm.core.rng import StepRng
from rcm.diffusion.interpolant import rf_noise
from rcm.losses.gan import (
    GanForm,
    approximate_r1,
    exact_r1,
    gan_critic_loss,
    gan_generator_loss,
    generator_loss,
)
from rcm.losses.term import LossTerm, NonFinitePolicy, sample_sum
from rcm.methods.draws import draw_noise
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.gan_head import Taps
from rcm.nets.layout import TokenLayout

R1Form = Literal["approximate", "exact", "off"]

HEAD = "gan_head"
"""Role of the head, which is updated together with the fake score."""


@dataclass(frozen=True)
class R1(Record):
    """How the discriminator is held flat at real videos: gamma / 2 |dD/dy|^2, y the noised video;
    `sigma` of the second look where it is approximated.
    """

    form: R1Form = "approximate"
    gamma: float = within(20.0, above=0)
    sigma: float = within(0.1, above=0)


@dataclass(frozen=True)
class Pull:
    """What a discriminator does to a video: the generator's `loss` per sample [B, 1] and its
    `gradient` [B, C, T, H, W], both constants; `loss_scale` of them.
    """

    loss: torch.Tensor
    gradient: torch.Tensor
    loss_scale: float
    nonfinite: NonFinitePolicy

    def term(self, generated: torch.Tensor, frames: slice = slice(None)) -> LossTerm:
        """The loss of `generated`, the video's `frames`, with graph. Terms of parts add up to that
        of the whole.
        """
        gradient = self.gradient[:, :, frames]
        share = gradient.shape[2] / self.gradient.shape[2]
        found = gan_generator_loss(
            generated,
            gradient,
            share * self.loss,
            loss_scale=self.loss_scale,
            nonfinite=self.nonfinite,
        )
        return replace(found, logs={key: share * value for key, value in found.logs.items()})


@dataclass(frozen=True)
class Adversary:
    """`head` on the tokens behind `blocks` of the `fake_score`.

    `loss_scale` weighs the generator's loss as DMD2's weight does: DMD's loss is a sum over the
    elements of a video where theirs is a mean, so this one is taken as many times.
    `loss_scale_critic` weighs the discriminator's loss beside the fake score's regression.
    """

    fake_score: Denoiser
    head: nn.Module
    blocks: tuple[int, ...]
    loss_scale: float
    loss_scale_critic: float
    form: GanForm = "softplus"
    r1: R1 = R1()
    nonfinite: NonFinitePolicy = "propagate"

    def look(
        self, y: torch.Tensor, t: torch.Tensor, cond: Condition, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The fake score's velocity at the noised video `y`, and the discriminator's logits
        [B, 1].
        """
        taps = Taps(self.blocks)
        v, tokens = self.fake_score.velocity_and_tokens(y, t, cond, layout, taps)
        assert v is not None, "these taps are not alone"
        return v, self.head(tokens)

    def critic_term(
        self,
        fake: torch.Tensor,
        real: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
        layout: TokenLayout,
        rng: StepRng,
    ) -> LossTerm:
        """The discriminator's loss: of its logits `fake` at generated videos, and at `real` videos
        of the data [B, C, T, H, W] noised to the same times, with R1 there. For these no block
        runs behind the last one that is read.
        """
        y = rf_noise(real, draw_noise(rng, "gan/noise", real.shape, real.device), t)
        y = y.detach().requires_grad_(self.r1.form == "exact")
        logits = self._logits(y, t, cond, layout)
        r1 = None
        if self.r1.form == "exact":
            r1 = exact_r1(logits, y)
        elif self.r1.form == "approximate":
            away = y + self.r1.sigma * draw_noise(rng, "gan/r1", y.shape, y.device)
            again = self._logits(away, t, cond, layout)
            r1 = approximate_r1(logits, again, sigma=self.r1.sigma)
        return gan_critic_loss(
            logits,
            fake,
            r1,
            form=self.form,
            loss_scale=self.loss_scale_critic,
            gamma=self.r1.gamma,
            nonfinite=self.nonfinite,
        )

    def pull(
        self,
        video: torch.Tensor,
        eps: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
        layout: TokenLayout,
    ) -> tuple[torch.Tensor, Pull]:
        """The fake score's velocity at the video noised with `eps`, without graph, and what the
        discriminator does to the video: one pass, whose gradient reaches no parameter.
        """
        video = video.detach().requires_grad_()
        with torch.enable_grad():
            v, logits = self.look(rf_noise(video, eps, t), t, cond, layout)
            loss = generator_loss(logits, self.form)
            (gradient,) = torch.autograd.grad(loss.sum(), video)
        # one bad value condemns its sample, also where it is replayed chunk by chunk
        gradient = gradient + 0 * sample_sum(gradient).view(-1, 1, 1, 1, 1)
        elements = video[0].numel()
        pull = Pull(loss.detach(), gradient, elements * self.loss_scale, self.nonfinite)
        return v.detach(), pull

    def _logits(
        self, y: torch.Tensor, t: torch.Tensor, cond: Condition, layout: TokenLayout
    ) -> torch.Tensor:
        taps = Taps(self.blocks, alone=True)
        return self.head(self.fake_score.velocity_and_tokens(y, t, cond, layout, taps)[1])
