"""The two records that data hands to training.

Shape legend: B batch, C latent channels, T latent frames, H W latent size, L text rows, E text
width, K stored ODE states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition


def _check_text(text: torch.Tensor, prompts: list[str]) -> None:
    if text.ndim != 3 or text.shape[0] != len(prompts):
        raise ConfigError(
            "text embeddings must be [B, L, E] with one row of B per prompt, got"
            f" {tuple(text.shape)} for {len(prompts)} prompts"
        )


@dataclass(frozen=True)
class LatentBatch:
    """Videos with their captions.

    `latents` [B, C, T, H, W] float32, clean and whitened; `cond` [B, L, E] float32, text embeddings
    (also readable as `text`); `prompts`, `keys` one string per sample (a key names a sample inside
    its data set); `trajectory` [B, K, C, T, H, W] float32 or None: stored states of a teacher's
    ODE, index 0 its clean end (docs/reference/training.md#ode-pairs). `latents` are the data that a
    causal teacher had as context, or the clean end itself where there was no data (a bidirectional
    teacher). Raises `ConfigError` when shapes disagree.
    """

    latents: torch.Tensor
    cond: torch.Tensor
    prompts: list[str]
    keys: list[str]
    trajectory: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.latents.ndim != 5:
            raise ConfigError(f"latents must be [B, C, T, H, W], got {tuple(self.latents.shape)}")
        _check_text(self.cond, self.prompts)
        if not len(self.keys) == len(self.prompts) == self.latents.shape[0]:
            raise ConfigError(
                f"{self.latents.shape[0]} latents came with {len(self.prompts)} prompts and"
                f" {len(self.keys)} keys"
            )
        expected = tuple(self.latents.shape)
        if self.trajectory is not None and (
            self.trajectory.ndim != 6
            or (self.trajectory.shape[0], *self.trajectory.shape[2:]) != expected
        ):
            raise ConfigError(
                f"trajectory must be [B, K, C, T, H, W] around latents {expected}, got"
                f" {tuple(self.trajectory.shape)}"
            )

    @property
    def text(self) -> torch.Tensor:
        """Text embeddings [B, L, E]: another name of `cond`, shared with `PromptBatch`."""
        return self.cond

    def condition(self) -> Condition:
        """The condition of the networks; a batch that carries more says so here."""
        return Condition(self.text)

    @property
    def batch_size(self) -> int:
        return self.latents.shape[0]

    def to(self, device: torch.device | str) -> LatentBatch:
        latents, cond = (x.to(device, non_blocking=True) for x in (self.latents, self.cond))
        trajectory = self.trajectory
        if trajectory is not None:
            trajectory = trajectory.to(device, non_blocking=True)
        return replace(self, latents=latents, cond=cond, trajectory=trajectory)


@dataclass(frozen=True)
class PromptBatch:
    """Captions alone, to train on own samples: `text` [B, L, E] float32, a prompt per sample."""

    text: torch.Tensor
    prompts: list[str]

    def __post_init__(self) -> None:
        _check_text(self.text, self.prompts)

    @property
    def batch_size(self) -> int:
        return self.text.shape[0]

    def to(self, device: torch.device | str) -> PromptBatch:
        return replace(self, text=self.text.to(device, non_blocking=True))
