"""From a path to videos: a checkpoint describes its network, codec, text encoder and sampler, so
nothing else is needed.

model = open_checkpoint("outputs/toy/toy_sf_dmd_c3-3")
for chunk in model.stream(["a red circle moving left"]): ...
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from rcm.core.device_copy import check_device
from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.core.records import require_kind
from rcm.core.rng import require_seed
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.guidance import is_guided
from rcm.encoders.codec import LatentCodec, fold_frames
from rcm.encoders.text_protocol import TextEncoder
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, guided
from rcm.nets.wan.config import WanConfig
from rcm.parallel.agree import on_first
from rcm.pipelines.described import (
    PieceFiles,
    codec_of,
    description_at,
    latent_shape_of,
    network_of,
    precision_of,
    recipes_of,
    text_of,
)
from rcm.pipelines.experts import Expert
from rcm.pipelines.models import Models
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import MemoryPolicy, Resident, move_codec, rest_encoder
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamedChunk, StreamReport, StreamSpec
from rcm.pipelines.streaming import collected, stream_video
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.pipelines.wan_files import COPIES, frozen, network_weights, require_fit
from rcm.pipelines.weight_files import open_weights
from rcm.rollout.recipe import SamplingRecipe
from rcm.storage.state_dicts import LazyWeights
from rcm.train.describe import Description

Recipe = SamplingRecipe | WholeVideoRecipe


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint ready to sample.

    `recipe` how a causal checkpoint was trained to be sampled, None for a bidirectional one, which
    has `sampler` instead; `latent_shape` (C, T, H, W) of a training sample; `fps` of its videos;
    `source` the path it came from; network and codec stay on the device as `memory` says.
    """

    network: Resident[Denoiser]
    description: Description
    recipe: SamplingRecipe | None
    sampler: WholeVideoRecipe | None
    resident_codec: Resident[LatentCodec]
    text: TextEncoder
    latent_shape: tuple[int, int, int, int]
    fps: float
    source: Path
    memory: MemoryPolicy
    _kept: dict[tuple[str, ...], Condition] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def models(self) -> Models:
        """What it is sampled with."""
        return Models(
            text=self.text,
            experts=(Expert("net", self.network),),
            codec=self.resident_codec,
            device=self.device,
            clock=self.network.clock,
            memory=self.memory,
        )

    @property
    def denoiser(self) -> Denoiser:
        """The network, frozen, in evaluation."""
        return self.network.use()

    @property
    def codec(self) -> LatentCodec:
        """The codec of its latents."""
        return self.resident_codec.use()

    @property
    def device(self) -> torch.device:
        """Where it is sampled."""
        return self.network.device

    @property
    def trained_recipe(self) -> Recipe:
        """`recipe` or `sampler`, whichever this checkpoint has."""
        found = self.recipe or self.sampler
        assert found is not None
        return found

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) of its videos."""
        stride = self.codec.spatial_stride
        return self.latent_shape[2] * stride, self.latent_shape[3] * stride

    @cached_property
    def negative(self) -> Condition:
        """Condition of the unconditional branch, batch 1."""
        return self.denoiser.prepare(
            Condition(self.text.encode([self.text.negative_prompt]).to(self.device))
        )

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Encoded prompts with their cross-attention keys computed once; those of the last call are
        kept. `ConfigError` for no prompts, or one the encoder refuses.
        """
        wanted = tuple(_listed(prompts))
        made = self._kept.get(wanted)
        if made is None:
            made = self.denoiser.prepare(Condition(self.text.encode(list(wanted)).to(self.device)))
            self._kept.clear()
            self._kept[wanted] = made
        return made

    def num_latent_frames(self, num_frames: int | None, *, pattern: BlockPattern | None) -> int:
        """Latent frames of a video of `num_frames` pixel frames (None: as trained). `ConfigError`,
        naming the nearest lengths, unless codec and pattern divide it; for a whole video beyond the
        network's positions (a stream has no limit).
        """
        frames = (
            self.latent_shape[1]
            if num_frames is None
            else fold_frames(num_frames, codec=self.codec, pattern=pattern)
        )
        limit = self.denoiser.net.config.max_frames
        if pattern is None and frames > limit:
            raise ConfigError(
                f"num_frames={num_frames} is {frames} latent frames, the network has positions for"
                f" {limit}; shorten it"
            )
        if pattern is not None:
            pattern.bounds(frames)
        return frames

    def stream(
        self,
        prompts: Sequence[str],
        *,
        recipe: Recipe | None = None,
        seed: int = 0,
        num_frames: int | None = None,
        prefix: Tensor | None = None,
        guidance: float | None = None,
        ignore_recipe: bool = False,
    ) -> Iterator[StreamedChunk]:
        """Chunks of one video per prompt, as they are made; a bidirectional checkpoint yields the
        whole video as one chunk.

        `recipe` replaces the trained one; one that contradicts it raises `ConfigError` unless
        `ignore_recipe`. `num_frames` counts pixel frames (None: as trained; longer is allowed).
        `prefix` [1 or B, C, k, H, W]: latents of given first frames, ending on a block. `guidance`
        replaces the recipe's scale; above 1 the negative prompt is used. All checks are made here,
        before the first chunk is asked for. Noise comes from `seed` on the CPU, the same on every
        device.
        """
        prompts = _listed(prompts)
        require_seed(seed, knob="seed=")
        require_kind("guidance", guidance, float | None)
        chosen = self._agreed(recipe, ignore=ignore_recipe)
        pattern = chosen.blocks if isinstance(chosen, SamplingRecipe) else None
        if prefix is not None and pattern is None:
            raise ConfigError(
                f"{self.source} samples whole videos (stage {self.description.stage}); it cannot"
                " continue given first frames"
            )
        frames = self.num_latent_frames(num_frames, pattern=pattern)
        channels, _, height, width = self.latent_shape
        cond = self.condition(prompts)
        scale = chosen.guidance if guidance is None else guidance
        negative = self.negative if is_guided(scale) else None
        rest_encoder(self.text, self.memory.text)  # both conditions are kept
        shape = (len(prompts), channels, frames, height, width)
        generator = torch.Generator().manual_seed(seed)
        if isinstance(chosen, WholeVideoRecipe):
            whole = replace(chosen, guidance=scale)
            return self._whole(cond, negative, whole, shape=shape, generator=generator)
        chosen = replace(chosen, guidance=scale)
        chosen.plans(frames)  # raises for times that do not decrease from the first one
        model = guided(self.denoiser, lambda: self.negative, scale)
        options: dict[str, Any] = {"shape": shape, "generator": generator, "device": self.device}
        return stream_video(model, self.codec, cond, chosen, prefix=prefix, **options)

    def _whole(
        self, cond: Condition, negative: Condition | None, recipe: WholeVideoRecipe, **options: Any
    ) -> Iterator[StreamedChunk]:
        """The video as a stream of a single chunk, so that callers treat both families alike."""
        begin = time.perf_counter()
        latents, _ = self.models.sample(cond, negative, recipe, **options)
        self.models.rest_networks()
        frames = self.models.decode(latents)
        if frames.is_cuda:
            torch.cuda.synchronize(frames.device)
        yield StreamedChunk(0, latents, frames, time.perf_counter() - begin)

    def open(
        self, prompts: Sequence[str], *, recipe: SamplingRecipe | None = None,
        num_frames: int | None = None, prefix: Tensor | None = None,
        ignore_recipe: bool = False, **options: Any,
    ) -> Session:  # fmt: skip
        """A session over one video per prompt: `num_frames` pixel frames, or None: without end.
        `options` of `StreamSpec`; the rest, and the errors, as `stream`. Change the prompts under
        way with `session.set_condition(model.condition([...]))`.
        """
        prompts = _listed(prompts)
        chosen = self._agreed(recipe, ignore=ignore_recipe)
        if not isinstance(chosen, SamplingRecipe):
            raise ConfigError(
                f"{self.source} samples whole videos (stage {self.description.stage}); only causal"
                " checkpoints open sessions"
            )
        channels, _, height, width = self.latent_shape
        frames = (
            None
            if num_frames is None
            else self.num_latent_frames(num_frames, pattern=chosen.blocks)
        )
        spec = StreamSpec(
            chosen, (channels, height, width), batch=len(prompts), num_frames=frames, **options
        )
        model = guided(self.denoiser, lambda: self.negative, chosen.guidance)
        cond = self.condition(prompts)
        return Session(model, self.codec, cond, spec, device=self.device, prefix=prefix)

    def generate(self, prompts: Sequence[str], **options: Any) -> tuple[Tensor, StreamReport]:
        """The whole video [B, 3, F, H, W] and its latencies; options as `stream`."""
        return collected(self.stream(prompts, **options))

    def _agreed(self, recipe: Recipe | None, *, ignore: bool) -> Recipe:
        trained = self.trained_recipe
        require_kind("recipe", recipe, Recipe | None)
        require_kind("ignore_recipe", ignore, bool)
        if recipe is None or recipe == trained:
            return trained
        if isinstance(recipe, SamplingRecipe) and isinstance(trained, SamplingRecipe):
            found = recipe.require_compatible(trained, allow=ignore)
        else:
            found = (
                []
                if type(recipe) is type(trained) and recipe.kind == trained.kind
                else [_other_family(recipe, trained)]
            )
            if found and not ignore:
                raise ConfigError(
                    f"the sampler contradicts the checkpoint: {found[0]}. Pass --ignore_recipe to"
                    " sample anyway"
                )
        for sentence in found:
            logger.warning("sampling against the checkpoint's description: {}", sentence)
        return recipe


def open_checkpoint(
    path: str | Path,
    *,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    precision: Precision | str | None = None,
    attention: str = "auto",
    files: PieceFiles = PieceFiles(),
    memory: MemoryPolicy | str = "idle",
) -> LoadedModel:
    """Everything needed to sample from `path`: a job folder (its newest checkpoint), an iter_*
    folder, or an exported file.

    `weights` "ema" or "reg" (an exported file holds one set, which is taken). `precision` a record,
    a preset's name, or None: that of the run. `files`: where this machine keeps Wan's VAE and umT5,
    for checkpoints trained with them. `memory`: what stays on the device when it is done, a record
    or one of `POLICIES`; streams under way hold what they need. Raises `CheckpointError` for a
    missing, damaged or undescribed checkpoint or one that does not fit its own description, and
    `ConfigError` where its codec or text encoder is not part of this version.
    """
    require_kind("path", path, str | Path)
    require_kind("precision", precision, Precision | str | None)
    require_kind("files", files, PieceFiles)
    check_device(device, knob="device=")
    if path == "":
        raise ConfigError("the path of the checkpoint is empty (--ckpt); name a file or a folder")
    path = Path(path)
    if weights not in COPIES:
        raise ConfigError(f"unknown weights {weights!r}; choose from {', '.join(COPIES)}")
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    description = description_at(path)
    extra = description.extra
    config = network_of(description, path)
    policy = precision_of(precision, extra.get("precision"))
    text = text_of(extra.get("text"), path, files=files, device=device)
    where, clock = torch.device(device), PartClock(device)
    # the codec is as precise as the network
    dtype = torch.bfloat16 if policy.compute.itemsize == 2 else torch.float32
    opened = partial(codec_of, extra.get("codec"), path, files=files, device=device, dtype=dtype)
    codec = Resident(opened, move=move_codec, device=where, clock=clock)
    recipe, sampler = recipes_of(extra, path)
    shape = latent_shape_of(
        extra.get("latent_shape"), config, codec=codec.use(), text=text, path=path
    )

    def open_network() -> Denoiser:
        tensors = on_first(lambda: _fitting(path, weights, config))
        return frozen(
            config,
            tensors,
            source=f"{path} ({weights})",
            device=device,
            precision=policy,
            attention=attention,
        )

    network = Resident(open_network, move=lambda x, to: x.net.to(to), device=where, clock=clock)
    network.use()
    return LoadedModel(
        network=network,
        description=description,
        recipe=recipe,
        sampler=sampler,
        resident_codec=codec,
        text=text,
        latent_shape=shape,
        fps=float(extra.get("fps", 16)),
        source=path,
        memory=MemoryPolicy.preset(memory) if isinstance(memory, str) else memory,
    )


def _fitting(path: Path, weights: str, config: WanConfig) -> LazyWeights:
    """The weights at `path`, once their names and shapes are seen to be those of the described
    network, of which nothing exists yet.
    """
    network = network_weights(open_weights(path), weights=weights)
    # told before a net of so many layers is laid out to compare names
    if config.num_layers > len(network):
        raise CheckpointError(
            f"{path} contradicts itself: {config.num_layers} layers are described, the file has"
            f" {len(network)} tensors"
        )
    require_fit(network, config, source=f"{path} ({weights})")
    return network


def _listed(prompts: Sequence[str]) -> list[str]:
    """The prompts of a batch. `ConfigError` for none, for one text, and for what is no text."""
    if (
        isinstance(prompts, str)
        or not isinstance(prompts, Sequence)
        or not prompts
        or not all(isinstance(prompt, str) for prompt in prompts)
    ):
        raise ConfigError(f"prompts must be a list with at least one string, got {prompts!r}")
    return list(prompts)


def _other_family(recipe: Recipe, trained: Recipe) -> str:
    def told(r: Recipe) -> str:
        if isinstance(r, SamplingRecipe):
            return f"{r.pattern} {r.kind!r}"
        return f"whole-video {r.kind!r}"

    return f"it was trained for {told(trained)} sampling, the sampler asks for {told(recipe)}"
