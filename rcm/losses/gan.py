"""The adversarial term of self-forced DMD: losses of a discriminator's logits, and R1 in two forms
(Causal_rCM.md section 6; DMD2, arXiv 2405.14867; R1, arXiv 1801.04406; APT, arXiv 2501.08316).

A discriminator D gives one logit per sample, [B, 1], positive for real. R1 is |dD/dy|^2 at real
samples y, summed over all of [C, T, H, W]: exactly, by a gradient that is differentiated again, or
estimated without one from a second look, (D(y + sigma eps) - D(y))^2 / sigma^2. The estimate is
unbiased for a linear D, and in the limit of small sigma for any.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from rcm.core.errors import ConfigError
from rcm.diffusion.time import require_same_shape
from rcm.losses.term import (
    LossTerm,
    NonFinitePolicy,
    require_videos,
    sample_sum,
    screen_samples,
)

GanForm = Literal["softplus", "hinge"]


def real_loss(logits: torch.Tensor, form: GanForm) -> torch.Tensor:
    """What a discriminator pays for real samples: softplus(-D), or max(0, 1 - D); elementwise."""
    loss = F.softplus(-logits) if _is_softplus(form) else F.relu(1 - logits)
    return loss + 0 * logits  # 0 * inf = NaN: an infinite logit is no perfect answer


def fake_loss(logits: torch.Tensor, form: GanForm) -> torch.Tensor:
    """What it pays for generated ones: softplus(D), or max(0, 1 + D); elementwise."""
    loss = F.softplus(logits) if _is_softplus(form) else F.relu(1 + logits)
    return loss + 0 * logits


def generator_loss(logits: torch.Tensor, form: GanForm) -> torch.Tensor:
    """What the generator pays: softplus(-D), which does not saturate, or -D; elementwise."""
    loss = F.softplus(-logits) if _is_softplus(form) else -logits
    return loss + 0 * logits


def exact_r1(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|dD/dy|^2 per sample, [B, 1], with graph: `logits` came from `y` [B, ...], which requires a
    gradient, by operators that can be differentiated twice.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), y, create_graph=True)
    return sample_sum(gradient**2).unsqueeze(1)


def approximate_r1(logits: torch.Tensor, perturbed: torch.Tensor, *, sigma: float) -> torch.Tensor:
    """((D(y + sigma eps) - D(y)) / sigma)^2, [B, 1]; `perturbed` are the logits at y + sigma eps,
    eps unit Gaussian. The term that APT prints, |D(y) - D(y + sigma eps)|^2, is sigma^2 times this.
    """
    require_same_shape(logits=logits, perturbed=perturbed)
    return ((perturbed - logits) / sigma) ** 2


def gan_critic_loss(
    real: torch.Tensor,
    fake: torch.Tensor,
    r1: torch.Tensor | None,
    *,
    form: GanForm = "softplus",
    loss_scale: float = 1.0,
    gamma: float = 0.0,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "gan_d",
) -> LossTerm:
    """loss_scale * mean of `real_loss` + `fake_loss` + gamma / 2 * `r1`, of the logits [B, 1] at
    real and at generated samples and R1 at the real ones (None: no penalty).

    Logs: mean logits, R1, the share of right answers (real above 0, generated below), and the
    number of non-finite samples. `ValueError` on unequal shapes.
    """
    r1 = torch.zeros_like(real) if r1 is None else r1
    require_same_shape(real=real, fake=fake, r1=r1)
    (real, fake, r1), bad = screen_samples(nonfinite, real, fake, r1)
    judged = real_loss(real, form) + fake_loss(fake, form) + gamma / 2 * r1
    right = torch.cat([real > 0, fake < 0])
    logs = {
        "gan/logit_real": real.detach().mean(),
        "gan/logit_fake": fake.detach().mean(),
        "gan/r1": r1.detach().mean(),
        "gan/right": right.double().mean(),
        f"{name}/nonfinite_samples": bad,
    }
    return LossTerm(name, loss_scale * judged.mean(), logs)


def gan_generator_loss(
    generated: torch.Tensor,
    gradient: torch.Tensor,
    loss: torch.Tensor,
    *,
    loss_scale: float = 1.0,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "gan_g",
) -> LossTerm:
    """loss_scale * mean of `loss` [B, 1], a constant, with the gradient loss_scale * `gradient` / B
    with respect to `generated` [B, C, T, H, W].

    A discriminator's gradient is taken once, at the whole video; being linear in `generated` this
    form adds up over frames, so that replay passes one block's frames of both and their share of
    `loss`. Logs: the number of non-finite samples. `ValueError` on unequal shapes.
    """
    require_videos(generated=generated, gradient=gradient)
    (generated, gradient, loss), bad = screen_samples(
        nonfinite, generated, gradient.detach(), loss.detach()
    )
    moved = sample_sum((generated - generated.detach()) * gradient)
    value = loss_scale * (loss.squeeze(1) + moved).mean()
    return LossTerm(name, value, {f"{name}/nonfinite_samples": bad})


def _is_softplus(form: str) -> bool:
    if form not in ("softplus", "hinge"):
        raise ConfigError(f"GAN loss {form!r} is unknown; choose from softplus, hinge")
    return form == "softplus"
