"""What can sample a suite: described checkpoints, and Wan's networks in original files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
from rcm.pipelines.models import Models
from rcm.pipelines.streaming import generate_video
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


class DescribedSampler:
    """A checkpoint that says how it is sampled; noise is drawn on the CPU from the seed.

    `num_frames`, `fps` None: as trained. `files`: by flag, in place of those that it names.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        weights: str,
        recipe: Recipe | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        ignore_recipe: bool = False,
        files: Mapping[str, str | Path] = {},
    ) -> None:
        self._files = dict(files)
        self._model, self._weights, self._recipe = model, weights, recipe or model.trained_recipe
        self._frames, self._ignore = num_frames, ignore_recipe
        self.fps = model.fps if fps is None else fps

    @property
    def settings(self) -> Mapping[str, Any]:
        model, precision = self._model, self._model.denoiser.precision
        height, width = model.pixel_size
        return {
            "sampler": "described",
            "checkpoint": {
                "digest": checkpoint_digest(model.source),
                "weights": self._weights,
                "stage": model.description.stage,
                "iteration": model.description.iteration,
                **{flag: checkpoint_digest(path) for flag, path in self._files.items()},
            },
            "recipe": asdict(self._recipe),
            "size": f"{height}x{width}",
            "num_frames": self._frames or model.codec.frames_for(model.latent_shape[1]),
            "precision": {"compute": str(precision.compute), "time": str(precision.time)},
            "device": model.device.type,
        }

    def prepare(self, texts: Sequence[str]) -> None:
        self._model = replace(self._model, text=KnownText(self._model.text, texts), _kept={})

    def sample(self, request: ClipRequest) -> Tensor:
        model = self._model
        prefix = None
        if request.image is not None:
            prefix = model.codec.encode(
                stretched_image(request.image, FrameSize(*model.pixel_size)).to(model.device)
            )
        frames, _ = model.generate(
            [request.text],
            recipe=self._recipe,
            seed=request.seed,
            num_frames=self._frames,
            prefix=prefix,
            ignore_recipe=self._ignore,
        )
        return frames[0].cpu()


class WanSampler:
    """Wan's bidirectional networks, noise drawn on the device; `files` by flag, for settings."""

    def __init__(
        self,
        pipeline: WanPipeline,
        *,
        recipe: WholeVideoRecipe,
        size: FrameSize,
        num_frames: int,
        files: Mapping[str, str | Path],
        about: Mapping[str, Any],
        fps: float = 16.0,
        negative_prompt: str | None = None,
    ) -> None:
        self._pipeline, self._recipe, self._size, self._frames = pipeline, recipe, size, num_frames
        self._files, self._about = dict(files), dict(about)
        self._negative, self.fps = negative_prompt, fps

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "sampler": "wan",
            "checkpoint": {flag: checkpoint_digest(path) for flag, path in self._files.items()},
            "recipe": {**asdict(self._recipe), "negative_prompt": self._negative},
            "size": str(self._size),
            "num_frames": self._frames,
            "device": self._pipeline.device.type,
            **self._about,
        }

    def prepare(self, texts: Sequence[str]) -> None:
        """On ranks that do not encode there is nothing to keep."""
        pipeline = self._pipeline
        if not isinstance(pipeline.text, TextEncoder):
            return
        wanted = [*texts] if self._negative is None else [*texts, self._negative]
        pipeline.text = KnownText(pipeline.text, wanted)

    def sample(self, request: ClipRequest) -> Tensor | None:
        # the pipeline stretches it to the size
        image = None if request.image is None else read_image(request.image)
        asked = VideoRequest(
            prompt=request.text,
            recipe=self._recipe,
            size=self._size,
            num_frames=self._frames,
            seed=request.seed,
            negative_prompt=self._negative,
            image=image,
        )
        made = self._pipeline.generate(asked)
        return None if made.frames is None else made.frames[0].cpu()


class CausalSampler:
    """A causal Wan network from its original files, noise drawn on the CPU, equal on all ranks.

    `latent_shape` (C, T, H, W). On several ranks all compute, the first one decodes and writes.
    """

    def __init__(
        self,
        models: Models,
        *,
        recipe: SamplingRecipe,
        latent_shape: tuple[int, int, int, int],
        negative_prompt: str,
        files: Mapping[str, str | Path],
        about: Mapping[str, Any],
        fps: float = 16.0,
    ) -> None:
        recipe.plans(latent_shape[1])
        self._models, self._recipe, self._shape = models, recipe, latent_shape
        self._negative, self._files, self._about = negative_prompt, dict(files), dict(about)
        self.fps = fps

    @property
    def settings(self) -> Mapping[str, Any]:
        _, frames, height, width = self._shape
        codec = self._models.codec.use()
        return {
            "sampler": "causal",
            "checkpoint": {flag: checkpoint_digest(path) for flag, path in self._files.items()},
            "recipe": {
                **asdict(self._recipe),
                "negative_prompt": self._negative if is_guided(self._recipe.guidance) else None,
            },
            "size": f"{height * codec.spatial_stride}x{width * codec.spatial_stride}",
            "num_frames": codec.frames_for(frames),
            "device": self._models.device.type,
            **self._about,
        }

    def prepare(self, texts: Sequence[str]) -> None:
        """On ranks that do not encode there is nothing to keep."""
        models = self._models
        if isinstance(models.text, TextEncoder):
            models.text = KnownText(models.text, [*texts, self._negative])

    def sample(self, request: ClipRequest) -> Tensor:
        models, recipe = self._models, self._recipe
        denoiser, codec = models.denoiser, models.codec.use()
        cond, *negative = (
            denoiser.prepare(Condition(models.embed([text])))
            for text in (request.text, *([self._negative] if is_guided(recipe.guidance) else []))
        )
        prefix = None
        if request.image is not None:
            size = FrameSize(*(side * codec.spatial_stride for side in self._shape[2:]))
            pixels = stretched_image(request.image, size).to(models.device)
            prefix = codec.encode(pixels).float()
        frames, _ = generate_video(
            guided(denoiser, lambda: negative[0], recipe.guidance),
            codec,
            cond,
            recipe,
            shape=(1, *self._shape),
            generator=torch.Generator().manual_seed(request.seed),
            prefix=prefix,
            device=models.device,
        )
        return frames[0].float().cpu()
