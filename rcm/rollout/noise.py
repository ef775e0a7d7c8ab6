"""Noise of a rollout: of a whole video as released, or keyed per chunk of an endless one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rcm.core.device_copy import to_device
from rcm.core.rng import generator, randn
from rcm.rollout.plan import ChunkPlan


class Noise(Protocol):
    """Unit noise [B, C, frames, H, W] of a video's latent frames [frames.start, stop)."""

    def start(self, frames: slice) -> Tensor:
        """What a chunk starts from."""

    def step(self, index: int, frames: slice) -> Tensor:
        """What is added when leaving step `index` (0-based) of a chunk."""

    def context(self, frames: slice) -> Tensor:
        """For a context that is noised again."""

    def state(self) -> Any:
        """What later draws depend on, for a snapshot."""

    def load_state(self, state: Any) -> None:
        """Take up a `state`."""


class ChunkNoise:
    """Noise without end: every draw has a key of its own, (seed, first frame, use), so that any
    chunk can be drawn at any time, in any order, and nothing is stored. `shape` [B, C, H, W]; draws
    are float32 on `draw_on`, handed out in `dtype` on `device`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        draw_on: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.seed, self.dtype = tuple(shape), seed, dtype
        self.device, self.draw_on = torch.device(device), draw_on

    def start(self, frames: slice) -> Tensor:
        return self._draw("start", frames)

    def step(self, index: int, frames: slice) -> Tensor:
        return self._draw(f"step {index}", frames)

    def context(self, frames: slice) -> Tensor:
        return self._draw("context", frames)

    def state(self) -> Any:
        """The seed: a draw depends on its key alone."""
        return self.seed

    def load_state(self, state: Any) -> None:
        self.seed = state

    def _draw(self, purpose: str, frames: slice) -> Tensor:
        batch, channels, height, width = self.shape
        source = generator(
            seed=self.seed,
            step=frames.start,
            dp_rank=0,
            purpose=f"stream/{purpose}",
            device=self.draw_on,
        )
        draw = randn((batch, channels, frames.stop - frames.start, height, width), generator=source)
        return to_device(draw, self.device).to(self.dtype)


class VideoNoise:
    """All noise of a video, drawn in order: the start, then `num_draws` whole step tensors.

    `shape` [B, C, T, H, W]; draws are float32 on the generator's device, handed out in `dtype` on
    `device`. Step j of every chunk reads its frames of step tensor j. As in the release, a last
    step that adds no noise has its tensor too. The first `given` frames are not generated: the
    start tensor leaves them out, step tensors do not. Noise for a context that is noised again is
    drawn on demand from the same generator.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        num_draws: int,
        generator: torch.Generator,
        dtype: torch.dtype,
        device: torch.device | str,
        given: int = 0,
    ) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device(device)
        self.given = given
        self._generator = generator
        batch, channels, frames, height, width = self.shape
        self._draws = [self._draw((batch, channels, frames - given, height, width))]
        self._draws += [self._draw(self.shape) for _ in range(num_draws)]

    @classmethod
    def for_plans(
        cls,
        plans: tuple[ChunkPlan, ...],
        shape: tuple[int, ...],
        *,
        generator: torch.Generator,
        dtype: torch.dtype,
        device: torch.device | str,
        renoises: bool = True,
    ) -> VideoNoise:
        """Noise for `plans`, all frames before given; `renoises` False (ODE): the start alone."""
        num = max(plan.num_steps for plan in plans) if renoises else 0
        return cls(
            shape,
            num_draws=num,
            generator=generator,
            dtype=dtype,
            device=device,
            given=plans[0].start,
        )

    def start(self, frames: slice) -> Tensor:
        mine = slice(frames.start - self.given, frames.stop - self.given)
        return self._draws[0][:, :, mine].to(self.dtype)

    def step(self, index: int, frames: slice) -> Tensor:
        return self._draws[index + 1][:, :, frames].to(self.dtype)

    def context(self, frames: slice) -> Tensor:
        batch, channels, _, height, width = self.shape
        draw = self._draw((batch, channels, frames.stop - frames.start, height, width))
        return draw.to(self.dtype)

    def state(self) -> Any:
        """What was drawn, which never changes, and the generator, which context noise needs."""
        return self.given, tuple(self._draws), self._generator.get_state()

    def load_state(self, state: Any) -> None:
        self.given, draws, generator = state
        self._draws = list(draws)
        self._generator.set_state(generator)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        source = self._generator
        draw = torch.randn(shape, generator=source, device=source.device, dtype=torch.float32)
        return to_device(draw, self.device)
