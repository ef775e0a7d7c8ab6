"""Wan's bidirectional sampling, whole: prompt and perhaps image to pixels, for every size, sampler
and memory policy.

One network, or two experts that take over from each other; each model is on the device when the
`MemoryPolicy` says. Under torchrun all ranks share each video (Ulysses): rank 0 encodes and
decodes, every rank computes its tokens. docs/reference/sampling.md,
docs/reference/wan.md#image-condition, #frame-sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rcm.core.errors import ConfigError, NonFinite
from rcm.diffusion.guidance import is_guided
from rcm.encoders.codec import LatentCodec, latent_frames
from rcm.encoders.text_protocol import TextEncoder
from rcm.nets.condition import Condition
from rcm.parallel.agree import on_first, shared, spread
from rcm.pipelines.experts import Expert, OnStep, Step, Switched, require_descending
from rcm.pipelines.image_condition import MASK_CHANNELS, fit_image, image_channels
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import MemoryPolicy, Resident, rest_encoder
from rcm.pipelines.text_to_video import WholeVideoRecipe, whole_latents
from rcm.pipelines.wan_sizes import FrameSize

LATENT_CHANNELS, TEMPORAL_STRIDE, SPATIAL_STRIDE = 16, 4, 8
"""Of Wan's VAE; here so that nothing has to be loaded to know a latent's shape."""


class ImageEncoder(Protocol):
    """CLIP's half of Wan2.1 image-to-video."""

    def encode(self, images: Tensor) -> Tensor:
        """Tokens [B, 257, 1280] of images [B, 3, H, W] in [-1, 1], any size."""
        ...


@dataclass(frozen=True)
class VideoRequest:
    """What to make. `size` in pixels; `num_frames` 4n + 1; `negative_prompt` None is the encoder's
    own; `image` uint8 [H, W, 3], the first frame, for image-to-video networks; `last_image` the
    last one, for networks that read two; `seed` of the one generator, on the device, from which all
    noise is drawn in float32.
    """

    prompt: str
    recipe: WholeVideoRecipe
    size: FrameSize
    num_frames: int
    num_samples: int = 1
    seed: int = 0
    negative_prompt: str | None = None
    image: Tensor | None = None
    last_image: Tensor | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """[B, 16, T, h, w]; `ConfigError` for frames or sizes that do not fold, or no samples."""
        if self.num_samples < 1:
            raise ConfigError(f"--num_samples {self.num_samples} must be at least 1")
        frames = latent_frames(self.num_frames, stride=TEMPORAL_STRIDE)
        if any(side % (2 * SPATIAL_STRIDE) for side in self.size):
            raise ConfigError(
                f"frames of {self.size} (HxW) do not fold into tokens of 16x16 pixels; change the"
                " size"
            )
        return (
            self.num_samples,
            LATENT_CHANNELS,
            frames,
            self.size.height // SPATIAL_STRIDE,
            self.size.width // SPATIAL_STRIDE,
        )

    @property
    def input_channels(self) -> int:
        """Channels of the network: those of the latent, and with an image the mask's and the
        image's.
        """
        return LATENT_CHANNELS if self.image is None else 2 * LATENT_CHANNELS + MASK_CHANNELS

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a latent frame: patches of 2 x 2."""
        return self.latent_shape[3] * self.latent_shape[4] // 4


@dataclass(frozen=True)
class GeneratedVideo:
    """Pixels [B, 3, F, H, W] (None but on rank 0), latents [B, 16, T, h, w] float32 (on every
    rank), and the steps that made them.
    """

    frames: Tensor | None
    latents: Tensor
    steps: tuple[Step, ...] = field(default=())


class WanPipeline:
    """Everything a Wan video is made with. `experts` in the order of their times, `text` and
    `codec` used on rank 0 only.

    `clip` is needed by networks with an image branch (Wan2.1 image-to-video). Raises `ConfigError`
    unless the experts' times descend to 0.
    """

    def __init__(
        self,
        *,
        text: TextEncoder,
        experts: Sequence[Expert],
        codec: Resident[LatentCodec],
        device: torch.device,
        clock: PartClock,
        memory: MemoryPolicy = MemoryPolicy(),
        clip: ImageEncoder | None = None,
    ) -> None:
        require_descending(experts)
        self.text, self.experts, self.codec, self.clip = text, tuple(experts), codec, clip
        self.device, self.clock, self.memory = device, clock, memory

    @torch.no_grad()
    def generate(self, request: VideoRequest, *, on_step: OnStep | None = None) -> GeneratedVideo:
        """Make the video of a request. Collective over the ranks of a launch. Raises `ConfigError`
        before any work for impossible shapes, `NonFinite` for a network that returns NaN.
        """
        shape = request.latent_shape
        if request.last_image is not None and request.image is None:
            raise ConfigError("a last frame is given without a first one; give both")
        guided = is_guided(request.recipe.guidance)
        cond, negative = self.conditions(request, guided=guided)
        generator = torch.Generator(self.device).manual_seed(request.seed)
        latents, steps = self.sample(
            cond, negative, request.recipe, shape=shape, generator=generator, on_step=on_step
        )
        for expert in self.experts:
            expert.network.rest(self.memory.network)
        return GeneratedVideo(on_first(lambda: self.decode(latents)), latents, steps)

    def conditions(
        self, request: VideoRequest, *, guided: bool
    ) -> tuple[Condition, Condition | None]:
        """The condition of the prompt, batch 1, and of the negative prompt where it is used; equal
        on all ranks.
        """
        prompts = [request.prompt]
        if guided:
            stated = request.negative_prompt
            prompts.append(self.text.negative_prompt if stated is None else stated)
        embedded = self.embed(prompts)
        images: dict[str, Tensor] = {}
        if request.image is not None:
            images["concat"] = self.from_first(lambda: self._image_channels(request))
            if self.clip is not None:
                images["image"] = self.from_first(lambda: self._image_tokens(request))
        return (
            tuple(Condition(row[None], **images) for row in embedded)
            if guided
            else (Condition(embedded, **images), None)
        )

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
            recipe.guidance if negative is not None else 1.0,
            times=recipe.times(),
            clock=self.clock,
            idle=self.memory.expert,
            on_step=on_step,
        )
        options = {"shape": shape, "generator": generator, "device": self.device}
        with self.clock.part("solver"):
            x0 = whole_latents(model, cond, recipe, **options)
        if not bool(torch.isfinite(x0).all()):
            raise NonFinite(
                "the network returned NaN or infinite latents; look at its weights and --precision"
            )
        return x0, tuple(model.steps)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] float32, one sample after the other; in host memory where the
        policy does not keep the codec.
        """
        where = self.device if self.memory.codec == "keep" else "cpu"

        def decoded(codec: LatentCodec) -> Tensor:
            with self.clock.part("decode"):
                return torch.cat([codec.decode(x[None]).to(where, torch.float32) for x in latents])

        return self.codec.lend(decoded, then=self.memory.codec)

    def _image_channels(self, request: VideoRequest) -> Tensor:
        def channels(codec: LatentCodec) -> Tensor:
            with self.clock.part("image"):
                images = [fit_image(x.to(self.device), request.size) for x in _images(request)]
                first, last = images[0], images[1] if len(images) > 1 else None
                return image_channels(codec, first, num_frames=request.num_frames, last=last)

        return self.codec.lend(channels, then=self.memory.codec)

    def _image_tokens(self, request: VideoRequest) -> Tensor:
        with self.clock.part("image"):
            pixels = [
                image.to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
                for image in _images(request)
            ]
            tokens = torch.cat([self.clip.encode(each).to(self.device) for each in pixels], dim=1)
            rest_encoder(self.clip, self.memory.text)
        return tokens

    def from_first(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns on rank 0, on every rank."""
        made = on_first(make)
        if not spread():
            return made
        return shared(None if made is None else made.cpu()).to(self.device)


def _images(request: VideoRequest) -> list[Tensor]:
    """The frames that are given, in time."""
    return [image for image in (request.image, request.last_image) if image is not None]
