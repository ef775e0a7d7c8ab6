"""Distribution matching (DMD), the student's share (Causal_rCM.md sections 6, 8; Causal-rCM eq. 7).
The fake score's regression: `losses/denoising.py`.

All inputs are data predictions [B, C, T, H, W] at one noised version of the generated video:
`x0_fake` by the fake score without guidance, `x0_teacher` by the guided teacher. The pseudo-target
is a tensor of its own because replayed back-propagation regresses block by block onto a target made
once for the whole video.
"""

from __future__ import annotations

import torch

from rcm.losses.term import (
    LossTerm,
    NonFinitePolicy,
    require_videos,
    sample_mean,
    sample_sum,
    screen_samples,
)


def dmd_normaliser(
    generated: torch.Tensor, x0_teacher: torch.Tensor, *, floor: float = 1e-5
) -> torch.Tensor:
    """w = max(mean |G - x0_teacher|, floor) per sample, float64 [B]; the mean runs over [C, T, H,
    W].
    """
    require_videos(generated=generated, x0_teacher=x0_teacher)
    return sample_mean(
        (generated.detach().double() - x0_teacher.detach().double()).abs()
    ).clamp_min(floor)


def dmd_target(
    generated: torch.Tensor, x0_fake: torch.Tensor, x0_teacher: torch.Tensor, *, floor: float = 1e-5
) -> torch.Tensor:
    """Pseudo-target G - (x0_fake - x0_teacher) / w, float64, without graph; w = `dmd_normaliser`.

    A NaN or infinity anywhere in a sample makes the whole sample of the target NaN, so that a
    block-wise (replayed) loss sees the same casualties as the whole-video one. `ValueError` on
    unequal shapes.
    """
    require_videos(generated=generated, x0_fake=x0_fake, x0_teacher=x0_teacher)
    generated, x0_fake, x0_teacher = (x.detach().double() for x in (generated, x0_fake, x0_teacher))
    score_difference = x0_fake - x0_teacher
    w = dmd_normaliser(generated, x0_teacher, floor=floor)
    # 0 * inf = NaN: one bad value condemns its sample
    w = w + 0 * (w + sample_sum(score_difference))
    return generated - score_difference / w.view(-1, 1, 1, 1, 1)


def dmd_loss(
    generated: torch.Tensor,
    target: torch.Tensor,
    *,
    loss_scale: float = 1.0,
    nonfinite: NonFinitePolicy = "propagate",
    name: str = "dmd",
) -> LossTerm:
    """loss_scale * sum (G - sg[target])^2 per sample, mean over the batch; gradient 2 loss_scale
    (x0_fake - x0_teacher) / (w B).

    `generated` with graph, [B, C, T, H, W]; `target` from `dmd_target`. For replay pass one block's
    frames of both: the sum is additive over frames. Logs: root mean square of the pull G - target,
    and the number of non-finite samples. `ValueError` on unequal shapes.
    """
    require_videos(generated=generated, target=target)
    (generated, target), bad = screen_samples(nonfinite, generated, target.detach())
    pull = generated.double() - target
    logs = {
        f"{name}/pull_rms": sample_mean(pull.detach() ** 2).sqrt().mean(),
        f"{name}/nonfinite_samples": bad,
    }
    return LossTerm(name, loss_scale * sample_sum(pull**2).mean(), logs)
