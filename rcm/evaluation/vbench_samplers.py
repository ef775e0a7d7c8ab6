"""What can sample a suite: described checkpoints, and Wan's networks in original files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.diffusion.guidance import is_guided
from rcm.encoders.text_protocol import TextEncoder
from rcm.evaluation.vbench_images import stretched_image
from rcm.evaluation.vbench_manifest import checkpoint_digest
from rcm.evaluation.vbench_sampling import ClipRequest
from rcm.nets.condition import Condition
from rcm.nets.denoiser import guided
from rcm.pipelines.from_checkpoint import LoadedModel, Recipe
from rcm.pipelines.image_condition import read_image
from rcm.pipelines.streaming import collected, stream_video
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.pipelines.wan_pipeline import VideoRequest, WanPipeline
from rcm.pipelines.wan_sizes import FrameSize
from rcm.rollout.recipe import SamplingRecipe


class KnownText:
    """A text encoder of known prompts alone (`KeyError` for others): they are encoded one by one,
    so that they do not depend on each other, and the encoder is freed.
    """

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str]) -> None:
        self.text_len, self.text_dim = encoder.text_len, encoder.text_dim
        self.negative_prompt = encoder.negative_prompt
        wanted = dict.fromkeys((*prompts, encoder.negative_prompt))
        self._rows = {prompt: encoder.encode([prompt]).cpu() for prompt in wanted}
        if hasattr(encoder, "unload"):
            encoder.unload()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([self._rows[prompt] for prompt in prompts])


@dataclass
class DescribedSampler:
    """A checkpoint that says how it is sampled; noise is drawn on the CPU from the seed.

    `recipe`, `num_frames` None, `fps` 0: as trained. `files`: by flag, in place of those that it
    names.
    """

    model: LoadedModel
    _: KW_ONLY
    weights: str
    recipe: Recipe | None = None
    num_frames: int | None = None
    fps: float = 0.0
    ignore_recipe: bool = False
    files: Mapping[str, str | Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe, self.fps = self.recipe or self.model.trained_recipe, self.fps or self.model.fps

    @property
    def settings(self) -> Mapping[str, Any]:
        model, precision = self.model, self.model.denoiser.precision
        height, width = model.pixel_size
        return {
            "sampler": "described",
            "checkpoint": {
                "digest": checkpoint_digest(model.source),
                "weights": self.weights,
                "stage": model.description.stage,
                "iteration": model.description.iteration,
                **_digests(self.files),
            },
            "recipe": asdict(self.recipe or model.trained_recipe),
            "size": f"{height}x{width}",
            "num_frames": self.num_frames or model.codec.frames_for(model.latent_shape[1]),
            "precision": {"compute": str(precision.compute), "time": str(precision.time)},
            "device": model.device.type,
        }

    def prepare(self, texts: Sequence[str]) -> None:
        self.model = replace(self.model, text=KnownText(self.model.text, texts), _kept={})

    def sample(self, request: ClipRequest) -> Tensor:
        model, prefix = self.model, None
        if request.image is not None:
            image = stretched_image(request.image, FrameSize(*model.pixel_size))
            prefix = model.codec.encode(image.to(model.device))
        frames, _ = model.generate(
            [request.text],
            recipe=self.recipe,
            seed=request.seed,
            num_frames=self.num_frames,
            prefix=prefix,
            ignore_recipe=self.ignore_recipe,
        )
        return frames[0].cpu()


@dataclass
class OriginalSampler:
    """What samplers of Wan's original files have in common. `files` by flag and `about` are noted
    in the settings.
    """

    models: WanPipeline
    _: KW_ONLY
    negative_prompt: str | None
    files: Mapping[str, str | Path]
    about: Mapping[str, Any]
    fps: float = 16.0

    def noted(self, sampler: str, recipe: Mapping[str, Any], **sizes: Any) -> dict[str, Any]:
        """The settings."""
        return {
            "sampler": sampler,
            "checkpoint": _digests(self.files),
            "recipe": dict(recipe),
            **sizes,
            "device": self.models.device.type,
            **self.about,
        }

    def prepare(self, texts: Sequence[str]) -> None:
        """On ranks that do not encode there is nothing to keep."""
        if isinstance(self.models.text, TextEncoder):
            negative = [] if self.negative_prompt is None else [self.negative_prompt]
            self.models.text = KnownText(self.models.text, [*texts, *negative])


@dataclass(kw_only=True)
class WanSampler(OriginalSampler):
    """Wan's bidirectional networks, noise drawn on the device."""

    recipe: WholeVideoRecipe
    size: FrameSize
    num_frames: int

    @property
    def settings(self) -> Mapping[str, Any]:
        recipe = {**asdict(self.recipe), "negative_prompt": self.negative_prompt}
        return self.noted("wan", recipe, size=str(self.size), num_frames=self.num_frames)

    def sample(self, request: ClipRequest) -> Tensor | None:
        asked = VideoRequest(
            prompt=request.text,
            recipe=self.recipe,
            size=self.size,
            num_frames=self.num_frames,
            seed=request.seed,
            negative_prompt=self.negative_prompt,
            # the pipeline stretches it to the size
            image=None if request.image is None else read_image(request.image),
        )
        made = self.models.generate(asked)
        return None if made.frames is None else made.frames[0].cpu()


@dataclass(kw_only=True)
class CausalSampler(OriginalSampler):
    """A causal Wan network, noise drawn on the CPU, equal on all ranks.

    `latent_shape` (C, T, H, W). On several ranks all compute, the first one decodes and writes.
    """

    recipe: SamplingRecipe
    latent_shape: tuple[int, int, int, int]
    negative_prompt: str

    def __post_init__(self) -> None:
        self.recipe.plans(self.latent_shape[1])

    @property
    def size(self) -> FrameSize:
        """Of the frames, in pixels."""
        stride = self.models.codec.use().spatial_stride
        return FrameSize(*(side * stride for side in self.latent_shape[2:]))

    @property
    def settings(self) -> Mapping[str, Any]:
        negative = self.negative_prompt if is_guided(self.recipe.guidance) else None
        recipe = {**asdict(self.recipe), "negative_prompt": negative}
        frames = self.models.codec.use().frames_for(self.latent_shape[1])
        return self.noted("causal", recipe, size=str(self.size), num_frames=frames)

    def sample(self, request: ClipRequest) -> Tensor:
        models, recipe = self.models, self.recipe
        denoiser, codec = models.denoiser, models.codec.use()
        cond, *negative = (
            denoiser.prepare(Condition(models.embed([text])))
            for text in (
                request.text,
                *([self.negative_prompt] if is_guided(recipe.guidance) else []),
            )
        )
        prefix = None
        if request.image is not None:
            pixels = stretched_image(request.image, self.size).to(models.device)
            prefix = codec.encode(pixels).float()
        chunks = stream_video(
            guided(denoiser, lambda: negative[0], recipe.guidance),
            codec,
            cond,
            recipe,
            shape=(1, *self.latent_shape),
            generator=torch.Generator().manual_seed(request.seed),
            prefix=prefix,
            device=models.device,
        )
        return collected(chunks)[0][0].float().cpu()


def _digests(files: Mapping[str, str | Path]) -> dict[str, str]:
    return {flag: checkpoint_digest(path) for flag, path in files.items()}
