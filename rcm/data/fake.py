"""Deterministic stand-in data, for tests, dry runs and speed measurements."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rcm.core.rng import generator, randn
from rcm.data.batch import LatentBatch


class FakeLatents:
    """A `loader.Source`: sample i of `seed` is Gaussian noise of `latent_shape` (C, T, H, W) and
    `text_shape` (L, E), the same on every call.

    Two rows of text at the end are zeros (where there are more than two), as in padded embeddings.
    `trajectory_states` K > 0 adds ODE states [K, C, T, H, W] that grow from the clean latents to
    noise.
    """

    def __init__(
        self,
        *,
        num: int,
        latent_shape: tuple[int, int, int, int],
        text_shape: tuple[int, int],
        seed: int = 0,
        trajectory_states: int = 0,
    ) -> None:
        self._num, self._latent_shape, self._text_shape = (
            num,
            tuple(latent_shape),
            tuple(text_shape),
        )
        self._seed, self._states = seed, trajectory_states

    def __len__(self) -> int:
        return self._num

    def fingerprint(self) -> str:
        """Names what the samples are made from."""
        return (
            f"fake-{self._seed}-{self._num}-{self._latent_shape}-{self._text_shape}-{self._states}"
        )

    def fetch(self, indices: Sequence[int]) -> LatentBatch:
        """The batch of samples `indices`."""
        latents = torch.stack([self._draw(i, self._latent_shape, "fake_latents") for i in indices])
        text = torch.stack([self._draw(i, self._text_shape, "fake_text") for i in indices])
        if self._text_shape[0] > 2:
            text[:, -2:] = 0
        trajectory = None
        if self._states:
            noise = torch.stack([self._draw(i, self._latent_shape, "fake_noise") for i in indices])
            times = torch.linspace(0, 1, self._states).view(1, -1, 1, 1, 1, 1)
            trajectory = torch.lerp(latents.unsqueeze(1), noise.unsqueeze(1), times)
        return LatentBatch(
            latents,
            text,
            [f"fake prompt {i}" for i in indices],
            [f"{i:09d}" for i in indices],
            trajectory,
        )

    def _draw(self, index: int, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        return randn(
            shape, generator=generator(seed=self._seed, step=index, dp_rank=0, purpose=purpose)
        )
