"""Classifier-free guidance, the only copy of the formula."""

from __future__ import annotations

from torch import Tensor


def is_guided(scale: float) -> bool:
    """Whether a scale asks for the negative branch: above 1. Any other: the prompt alone."""
    return scale > 1


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond), for any prediction linear in v (Causal_rCM.md section 1).

    Self-Forcing writes cond + s (cond - uncond), which is this with scale s + 1.
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            f"guidance needs equal shapes, got cond {tuple(cond.shape)} and uncond"
            f" {tuple(uncond.shape)}"
        )
    return uncond + scale * (cond - uncond)
