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
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.core.errors import ConfigError, NonFinite
from rcm.diffusion.guidance import cfg, is_guided
from rcm.encoders.codec import LatentCodec, latent_frames
from rcm.encoders.text_protocol import TextEncoder
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.parallel.agree import on_first, shared
from rcm.pipelines.image_condition import MASK_CHANNELS, fit_image, image_channels
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import MemoryPolicy, Resident
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.pipelines.wan_sizes import FrameSize
from rcm.rollout.autoregressive import time_tensor

LATENT_CHANNELS, TEMPORAL_STRIDE, SPATIAL_STRIDE = 16, 4, 8
"""Of Wan's VAE; here so that nothing has to be loaded to know a latent's shape."""


class ImageEncoder(Protocol):
    """CLIP's half of Wan2.1 image-to-video."""

    def encode(self, images: Tensor) -> Tensor:
        """Tokens [B, 257, 1280] of images [B, 3, H, W] in [-1, 1], any size."""
        ...


@dataclass(frozen=True)
class Expert:
    """A network, and the RF time down to which it is in charge (0 for the only or the last one)."""

    name: str
    network: Resident[Denoiser]
    down_to: float = 0.0


@dataclass(frozen=True)
class Step:
    """One network evaluation as it was made: its number from 0, RF time, the expert in charge,
    seconds of its forwards alone.
    """

    index: int
    t: float
    expert: str
    seconds: float


OnStep = Callable[[Step, int], None]
"""Called after every step with the step and their number in all."""


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
        bounds = [expert.down_to for expert in experts]
        if (
            not bounds
            or bounds[-1] != 0
            or any(not 0 <= b < a for a, b in pairwise([1.0, *bounds]))
        ):
            raise ConfigError(
                "experts must be in charge down to decreasing times below 1 that end at 0, got"
                f" {bounds}; change --boundary"
            )
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
            prompts.append(self._negative_prompt(request))

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
                self._rest(self.text)
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
        sampler = recipe.sampler()
        with self.clock.part("solver"):
            noise = torch.randn(
                shape, generator=generator, device=generator.device, dtype=torch.float32
            ).to(self.device, torch.float64)
            walk = _Walk(
                self, cond, negative, recipe.guidance, total=len(sampler.times) - 1, on_step=on_step
            )
            x0 = sampler.sample(walk.velocity, noise, generator=generator).float()
        if not bool(torch.isfinite(x0).all()):
            raise NonFinite(
                "the network returned NaN or infinite latents; look at its weights and --precision"
            )
        return x0, tuple(walk.steps)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] float32, one sample after the other; in host memory where the
        policy does not keep the codec.
        """
        codec = self.codec.use()
        with self.clock.part("decode"):
            where = self.device if self.memory.codec == "keep" else "cpu"
            frames = torch.cat(
                [codec.decode(sample[None]).to(where, torch.float32) for sample in latents]
            )
        del codec
        self.codec.rest(self.memory.codec)
        return frames

    def _negative_prompt(self, request: VideoRequest) -> str:
        return (
            self.text.negative_prompt
            if request.negative_prompt is None
            else request.negative_prompt
        )

    def _rest(self, encoder: TextEncoder | ImageEncoder) -> None:
        """An encoder is done; one without weights to free or to move has neither method."""
        if self.memory.text == "free" and hasattr(encoder, "unload"):
            encoder.unload()
        if self.memory.text == "cpu" and hasattr(encoder, "to"):
            encoder.to("cpu")

    def _image_channels(self, request: VideoRequest) -> Tensor:
        codec = self.codec.use()
        with self.clock.part("image"):
            first, *last = (
                fit_image(image.to(self.device), request.size) for image in _images(request)
            )
            channels = image_channels(
                codec, first, num_frames=request.num_frames, last=last[0] if last else None
            )
        del codec
        self.codec.rest(self.memory.codec)
        return channels

    def _image_tokens(self, request: VideoRequest) -> Tensor:
        with self.clock.part("image"):
            pixels = [
                image.to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
                for image in _images(request)
            ]
            tokens = torch.cat([self.clip.encode(each).to(self.device) for each in pixels], dim=1)
            self._rest(self.clip)
        return tokens

    def from_first(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns on rank 0, on every rank."""
        made = on_first(make)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return made
        shape, dtype = shared(None if made is None else (tuple(made.shape), made.dtype))
        sent = (
            torch.empty(shape, dtype=torch.float32, device=self.device)
            if made is None
            else made.to(self.device, torch.float32)
        )
        dist.broadcast(sent, src=0)
        return sent.to(dtype)


def _images(request: VideoRequest) -> list[Tensor]:
    """The frames that are given, in time."""
    return [image for image in (request.image, request.last_image) if image is not None]


class _Walk:
    """One way from noise to data: the expert in charge with its conditions, and the record of the
    steps.
    """

    def __init__(
        self,
        pipeline: WanPipeline,
        cond: Condition,
        negative: Condition | None,
        scale: float,
        *,
        total: int,
        on_step: OnStep | None,
    ) -> None:
        self.pipeline, self.scale, self.total, self.on_step = pipeline, scale, total, on_step
        self.steps: list[Step] = []
        self._given = [cond] if negative is None else [cond, negative]
        self._conditions: list[Condition] = []
        self._number = -1
        self._layout: TokenLayout | None = None

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """v at `x` [B, C, T, H, W] and RF time `t`, guided; takes the next expert when the one in
        charge is done.
        """
        denoiser = self._in_charge(t, x)
        expert, clock = self.pipeline.experts[self._number], self.pipeline.clock
        before = clock.seconds.get("network", 0.0)
        with clock.part("network"):
            times = time_tensor(t, x.shape[0], x.device)
            results = [
                denoiser.velocity(x, times, cond.expand(x.shape[0]), self._layout)
                for cond in self._conditions
            ]
            v = results[0] if len(results) == 1 else cfg(*results, self.scale)
        self.steps.append(Step(len(self.steps), t, expert.name, clock.seconds["network"] - before))
        if self.on_step is not None:
            self.on_step(self.steps[-1], self.total)
        return v

    def _in_charge(self, t: float, x: Tensor) -> Denoiser:
        experts = self.pipeline.experts
        number = next(i for i, expert in enumerate(experts) if t >= expert.down_to)
        if number != self._number:
            # the last references to what the expert in charge computed from the prompts
            self._conditions = []
            for other in (*experts[:number], *experts[number + 1 :]):
                other.network.rest(self.pipeline.memory.expert)
            self._number = number
            denoiser = experts[number].network.use()
            _require_task(denoiser, self._given[0], channels=x.shape[1], name=experts[number].name)
            with self.pipeline.clock.part("network"):
                self._conditions = [denoiser.prepare(cond) for cond in self._given]
            self._layout = TokenLayout.bidirectional(
                x.shape[2], grid=denoiser.token_grid(*x.shape[3:])
            )
        return experts[number].network.use()


def _require_task(denoiser: Denoiser, cond: Condition, *, channels: int, name: str) -> None:
    """`ConfigError` for a text-to-video network that is given an image, or the other way round."""
    if not isinstance(denoiser, Denoiser):
        return
    config = denoiser.net.config
    given = channels + (0 if cond.concat is None else cond.concat.shape[1])
    if config.in_dim != given:
        raise ConfigError(
            f"the network {name} reads {config.in_dim} channels, {given} are given ({channels} of"
            " noise, the others of an image): it was made for another task (16 text-to-video, 36"
            " image-to-video); give another file"
        )
    if config.image_branch != (cond.image is not None):
        has = (
            "has an image branch (Wan2.1 image-to-video) and needs the CLIP encoder"
            if config.image_branch
            else "has no image branch"
        )
        raise ConfigError(
            f"the network {name} {has}; WanPipeline(clip=...) decides whether it is given image"
            " tokens"
        )
    ends = (
        cond.concat is not None
        and cond.concat.shape[2] > 1
        and bool(cond.concat[0, MASK_CHANNELS - 1, -1].any())
    )
    if ends != bool(config.image_positions):
        made = (
            "a first and a last frame (Wan2.1 FLF2V)"
            if config.image_positions
            else "a first frame alone"
        )
        raise ConfigError(
            f"the network {name} was made for {made}, {'both are' if ends else 'one is'} given"
            " (--last_image_path)"
        )
