"""Wan's bidirectional videos: from a prompt and perhaps images to pixels, for every size and
sampler. docs/reference/sampling.md, docs/reference/wan.md#image-condition, #frame-sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.diffusion.guidance import is_guided
from rcm.encoders.codec import LatentCodec, latent_frames
from rcm.nets.condition import Condition
from rcm.parallel.agree import on_first
from rcm.pipelines.experts import Expert, OnStep, Step
from rcm.pipelines.image_condition import MASK_CHANNELS, fit_image, image_channels
from rcm.pipelines.models import ImageEncoder, Models
from rcm.pipelines.residency import rest_encoder
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.pipelines.wan_sizes import FrameSize

__all__ = ["Expert", "GeneratedVideo", "ImageEncoder", "Step", "VideoRequest", "WanPipeline"]
"""What a pipeline is made of by hand, and what it is asked and tells."""

LATENT_CHANNELS, TEMPORAL_STRIDE, SPATIAL_STRIDE = 16, 4, 8
"""Of Wan's VAE; here so that nothing has to be loaded to know a latent's shape."""


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


class WanPipeline(Models):
    """Wan's bidirectional videos by request, of `Models`: `clip` is needed by networks with an
    image branch (Wan2.1 image-to-video).
    """

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
        self.rest_networks()
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
        concat = image = None
        if request.image is not None:
            concat = self.from_first(lambda: self._image_channels(request))
            if (clip := self.clip) is not None:
                image = self.from_first(lambda: self._image_tokens(clip, request))
        made = [Condition(row[None], concat=concat, image=image) for row in embedded]
        return made[0], made[1] if guided else None

    def _image_channels(self, request: VideoRequest) -> Tensor:
        def channels(codec: LatentCodec) -> Tensor:
            with self.clock.part("image"):
                images = [fit_image(x.to(self.device), request.size) for x in _images(request)]
                first, last = images[0], images[1] if len(images) > 1 else None
                return image_channels(codec, first, num_frames=request.num_frames, last=last)

        return self.codec.lend(channels, then=self.memory.codec)

    def _image_tokens(self, clip: ImageEncoder, request: VideoRequest) -> Tensor:
        with self.clock.part("image"):
            pixels = [
                image.to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
                for image in _images(request)
            ]
            tokens = torch.cat([clip.encode(each).to(self.device) for each in pixels], dim=1)
            rest_encoder(clip, self.memory.text)
        return tokens


def _images(request: VideoRequest) -> list[Tensor]:
    """The frames that are given, in time."""
    return [image for image in (request.image, request.last_image) if image is not None]
