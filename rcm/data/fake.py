"""Deterministic stand-in data, for tests, dry runs and speed measurements."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rcm.core.rng import generator, randn
from rcm.data.batch import LatentBatch


class FakeLatents:
    """A `loader.Source` of Gaussian noise: sample i of `seed` is the same on every call.

    `latent_shape` (C, T, H, W); `text_shape` (L, E): where L > 2 the last two rows are zeros, as in
    padded embeddings. `trajectory_states` K > 0 adds ODE states [K, C, T, H, W] that grow from the
    clean latents to noise.
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
        self._num, self._seed, self._states = num, seed, trajectory_states
        self._latent_shape, self._text_shape = tuple(latent_shape), tuple(text_shape)

    def __len__(self) -> int:
        return self._num

    def fingerprint(self) -> str:
        return (
            f"fake-{self._seed}-{self._num}-{self._latent_shape}-{self._text_shape}-{self._states}"
        )

    def fetch(self, indices: Sequence[int]) -> LatentBatch:
        latents = self._draw(indices, self._latent_shape, "fake_latents")
        text = self._draw(indices, self._text_shape, "fake_text")
        if self._text_shape[0] > 2:
            text[:, -2:] = 0
        trajectory = None
        if self._states:
            noise = self._draw(indices, self._latent_shape, "fake_noise")
            times = torch.linspace(0, 1, self._states).view(1, -1, 1, 1, 1, 1)
            trajectory = torch.lerp(latents.unsqueeze(1), noise.unsqueeze(1), times)
        prompts, keys = [f"fake prompt {i}" for i in indices], [f"{i:09d}" for i in indices]
        return LatentBatch(latents, text, prompts, keys, trajectory)

    def _draw(self, indices: Sequence[int], shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        streams = (generator(seed=self._seed, step=i, dp_rank=0, purpose=purpose) for i in indices)
        return torch.stack([randn(shape, generator=stream) for stream in streams])
