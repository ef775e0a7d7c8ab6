"""Sample grids during training: the student samples prompts, rank 0 writes mp4 files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor

from rcm.configs.build_data import latent_shape
from rcm.configs.build_method import sampling_recipe
from rcm.configs.compose import Run
from rcm.configs.pieces import codec_of_run, encode_once, toy_world
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_common import CommonModelConfig
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Guided, VelocityModel
from rcm.parallel.agree import on_first, shared
from rcm.pipelines.streaming import stream_latents
from rcm.pipelines.text_to_video import WholeVideoRecipe, whole_latents
from rcm.pipelines.video_io import write_mp4
from rcm.train.observers import Observer, SampleGrid

PREVIEW_STEPS = 50
"""Euler steps of bidirectional previews, as in the release."""

PREVIEW_SIGMA_MAX = 1600.0
"""Noise level that they start from."""

PREVIEW_PROMPTS = (
    (
        "A red fox trots through fresh snow at the edge of a pine forest, its breath visible in the"
        " cold morning light."
    ),
    "A sailing boat leans into the wind on a choppy blue sea while gulls circle above the mast.",
    "Hands knead dough on a floured wooden table, close-up, warm light from a window on the left.",
    (
        "A yellow tram climbs a steep street between tiled houses, people step aside, the camera"
        " follows slowly."
    ),
    (
        "Rain falls on a neon-lit crossing at night; umbrellas move in every direction, seen from"
        " above."
    ),
)
"""What a run on Wan latents draws."""


def sample_observers(
    run: Run, folder: Path, student: VelocityModel, *, device: torch.device
) -> list[Observer]:
    """Grids of the live and the averaged student, as `trainer.sampling` asks. Collective."""
    config, sampling = run.config, run.config.trainer.sampling
    every_n = {"reg": sampling.every_n, "ema": sampling.ema_every_n}
    wanted = {weights: every for weights, every in every_n.items() if every}
    if not wanted:
        return []
    if lacking := shared(on_first(lambda: _lacking(config.model.config))):
        logger.warning("trainer.sampling: no previews, {}", lacking)
        return []
    draw = _drawer(config, student, device=device)
    write = partial(_write, toy=config.model.config.tokenizer.name == "toy")
    return [
        SampleGrid(
            every=every,
            draw=draw,
            write=write,
            folder=folder / "samples",
            weights=weights,
            at_start=sampling.run_at_start,
        )
        for weights, every in wanted.items()
    ]


def _lacking(model: CommonModelConfig) -> str:
    """What previews need beyond training, which goes by stored latents and embeddings; or ""."""
    if model.text_encoder_class == "umT5" and not model.text_encoder_path:
        return (
            "they need prompts encoded: set model.config.text_encoder_path, or"
            " trainer.sampling.every_n=0 and ema_every_n=0"
        )
    if model.tokenizer.name == "wan" and not Path(model.tokenizer.vae_pth).exists():
        return (
            f"they need Wan's VAE, and there is no {model.tokenizer.vae_pth}: set"
            " model.config.tokenizer.vae_pth"
        )
    return ""


def _drawer(
    config: TrainConfig, student: VelocityModel, *, device: torch.device
) -> Callable[[int], Tensor]:
    """Draws frames of preview prompts on rank 0, latents on the others. Collective."""
    model, count = config.model.config, config.trainer.sampling.num_samples
    codec = on_first(lambda: codec_of_run(model, device=device))
    texts = encode_once(
        model, lambda encoder: [*preview_prompts(config), encoder.negative_prompt], device=device
    ).to(device)
    cond = Condition(texts[:-1])
    shape = (count, *latent_shape(model))
    recipe = sampling_recipe(model)
    preview = WholeVideoRecipe(
        "ode",
        sigma_max=PREVIEW_SIGMA_MAX,
        steps=PREVIEW_STEPS,
        shift=getattr(model, "sample_timestep_shift", 5.0),
    )
    if recipe is not None and recipe.kind == "ode" and recipe.guidance > 1:
        student = Guided(student, Condition(texts[-1:]), recipe.guidance)

    def draw(iteration: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.trainer.seed)
        if recipe is None:
            latents = whole_latents(
                student, cond, preview, shape=shape, generator=generator, device=device
            )
        else:
            chunks = stream_latents(
                student, cond, recipe, shape=shape, generator=generator, device=device
            )
            latents = torch.cat([x for _, x in chunks], dim=2)
        if codec is None:
            return latents
        # one by one: training holds the card's memory
        return torch.cat([codec.decode(x[None].float()).cpu() for x in latents])

    return draw


def preview_prompts(config: TrainConfig) -> list[str]:
    """A prompt per column of a grid: the world's captions, or the built-in ones in turn."""
    model, count = config.model.config, config.trainer.sampling.num_samples
    if model.text_encoder_class == "toy":
        world = toy_world(model)
        return world.captions(world.scenes(count, seed=config.trainer.seed + 1))
    return [PREVIEW_PROMPTS[i % len(PREVIEW_PROMPTS)] for i in range(count)]


def _write(path: Path, videos: Tensor, *, toy: bool) -> None:
    """[B, 3, F, H, W] side by side in width; slower and larger where they are small and short."""
    fps, scale = (8, 8) if toy else (16, 1)
    write_mp4(path.with_suffix(".mp4"), torch.cat(list(videos), dim=-1), fps=fps, scale=scale)
