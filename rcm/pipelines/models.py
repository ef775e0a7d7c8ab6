"""What a video is made with, and the way from prompts to latents and pixels, whoever opened the
files: each model is on the device when the `MemoryPolicy` says. Under torchrun all ranks share each
video (Ulysses): rank 0 encodes and decodes, every rank computes its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rcm.core.errors import NonFinite
from rcm.encoders.codec import LatentCodec
from rcm.encoders.text_protocol import TextEncoder
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.parallel.agree import on_first, shared, spread
from rcm.pipelines.experts import Expert, OnStep, Step, Switched, require_descending
from rcm.pipelines.finite import DECODER, Reading
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import MemoryPolicy, Resident, rest_encoder
from rcm.pipelines.text_to_video import WholeVideoRecipe, whole_latents


class ImageEncoder(Protocol):
    """CLIP's half of Wan2.1 image-to-video."""

    def encode(self, images: Tensor) -> Tensor:
        """Tokens [B, 257, 1280] of images [B, 3, H, W] in [-1, 1], any size."""
        ...


@dataclass(kw_only=True)
class Models:
    """`experts` in the order of their times, mostly one; `text`, `codec` and `clip` are used on
    rank 0 only. Raises `ConfigError` unless the experts' times descend to 0.
    """

    text: TextEncoder
    experts: Sequence[Expert]
    codec: Resident[LatentCodec]
    device: torch.device
    clock: PartClock
    memory: MemoryPolicy = MemoryPolicy()
    clip: ImageEncoder | None = None

    def __post_init__(self) -> None:
        require_descending(self.experts)

    @property
    def denoiser(self) -> Denoiser:
        """The first network, mostly the only one."""
        return self.experts[0].network.use()

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [P, L, E] of prompts, made by rank 0, equal on all ranks; then the text
        encoder rests.
        """

        def encode() -> Tensor:
            with self.clock.part("text"):
                encoded = self.text.encode(list(prompts)).to(self.device)
                rest_encoder(self.text, self.memory.text)
            return encoded

        return self.from_first(encode)

    def sample(
        self,
        cond: Condition,
        negative: Condition | None,
        recipe: WholeVideoRecipe,
        *,
        shape: tuple[int, int, int, int, int],
        generator: torch.Generator,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, tuple[Step, ...]]:
        """x0 [B, C, T, H, W] float32 of `shape` and the steps; state in float64, noise drawn in
        float32 from `generator`.
        """
        model = Switched(
            self.experts,
            negative,
            recipe.guidance,
            times=recipe.times(),
            clock=self.clock,
            idle=self.memory.expert,
            on_step=on_step,
        )
        with self.clock.part("solver"):
            x0 = whole_latents(
                model, cond, recipe, shape=shape, generator=generator, device=self.device
            )
        if not bool(torch.isfinite(x0).all()):
            raise NonFinite(
                "the network returned NaN or infinite latents; look at its weights and --precision"
            )
        return x0, tuple(model.steps)

    def rest_networks(self) -> None:
        """Sampling is over."""
        for expert in self.experts:
            expert.network.rest(self.memory.network)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] float32, one sample after the other; in host memory where the
        policy does not keep the codec. `NonFinite` for NaN or infinite ones.
        """
        where = self.device if self.memory.codec == "keep" else "cpu"

        def decoded(codec: LatentCodec) -> Tensor:
            with self.clock.part("decode"):
                return torch.cat([codec.decode(x[None]).to(where, torch.float32) for x in latents])

        pixels = self.codec.lend(decoded, then=self.memory.codec)
        if Reading(pixels).wrong() is not None:
            raise NonFinite(DECODER)
        return pixels

    def from_first(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns on rank 0, on every rank."""
        if not spread():
            return make()
        made = on_first(make)
        return shared(None if made is None else made.cpu()).to(self.device)
