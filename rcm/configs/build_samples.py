"""Sample grids during training: the student streams prompts on a schedule, and rank 0 writes mp4 files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from loguru import logger

from rcm.configs.build_data import latent_shape, toy_codec, toy_text, toy_world
from rcm.configs.build_method import sampling_recipe
from rcm.configs.compose import Run
from rcm.configs.schema import TrainConfig
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Guided, VelocityModel
from rcm.nets.layout import TokenLayout
from rcm.pipelines.streaming import stream_latents
from rcm.pipelines.video_io import write_mp4
from rcm.rollout.autoregressive import time_tensor
from rcm.samplers.bidirectional import sample_video
from rcm.samplers.schedule import shifted_grid
from rcm.samplers.steps import EulerStep
from rcm.train.observers import Observer, SampleGrid

PREVIEW_STEPS = 50
"""Euler steps of bidirectional previews, as in the release."""


def sample_observers(run: Run, folder: Path, student: VelocityModel, *, device: torch.device) -> list[Observer]:
    """Grids of the live and of the averaged student, where `trainer.sampling` asks for them."""
    config, sampling = run.config, run.config.trainer.sampling
    wanted = [(weights, every) for weights, every in (("reg", sampling.every_n), ("ema", sampling.ema_every_n)) if every]
    if not wanted:
        return []
    if config.model.config.tokenizer.name != "toy" or config.model.config.text_encoder_class != "toy":
        logger.warning(
            "trainer.sampling: previews need Wan's VAE and umT5 in the training process, which this version has not; no previews"
        )
        return []
    draw = _toy_drawer(config, student, device=device)
    return [
        SampleGrid(every=every, draw=draw, write=_write, folder=folder / "samples", weights=weights, at_start=sampling.run_at_start)
        for weights, every in wanted
    ]


def _toy_drawer(config: TrainConfig, student: VelocityModel, *, device: torch.device) -> Callable[[int], torch.Tensor]:
    model, count = config.model.config, config.trainer.sampling.num_samples
    world, text, codec = toy_world(model), toy_text(model), toy_codec(model)
    prompts = world.captions(world.scenes(count, seed=config.trainer.seed + 1))
    cond = Condition(text.encode(prompts).to(device))
    shape = (count, *latent_shape(model))
    recipe = sampling_recipe(model)
    if recipe is not None and recipe.kind == "ode" and recipe.guidance > 1:
        student = Guided(student, Condition(text.encode([text.negative_prompt]).to(device)), recipe.guidance)

    def draw(iteration: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(config.trainer.seed)
        if recipe is None:
            latents = _whole_video(
                student, cond, shape, shift=getattr(model, "sample_timestep_shift", 5.0), generator=generator, device=device
            )
        else:
            chunks = stream_latents(student, cond, recipe, shape=shape, generator=generator, device=device)
            latents = torch.cat([x for _, x in chunks], dim=2)
        return codec.decode(latents.float().cpu())

    return draw


def _whole_video(student, cond, shape, *, shift, generator, device) -> torch.Tensor:
    layout = TokenLayout.bidirectional(shape[2], grid=student.token_grid(shape[3], shape[4]))
    noise = torch.randn(shape, generator=generator).to(device, torch.float64)
    velocity = partial(_velocity, student, cond, layout)
    return sample_video(
        velocity, noise, times=shifted_grid(PREVIEW_STEPS, shift=shift, sigma_max=1600.0), rule=EulerStep(), scale_first=False
    )


def _velocity(student, cond, layout, x: torch.Tensor, t: float) -> torch.Tensor:
    return student.velocity(x, time_tensor(t, x.shape[0], x.device), cond, layout)


def _write(path: Path, videos: torch.Tensor) -> None:
    """[B, 3, F, H, W] side by side in width, enlarged."""
    tiled = torch.cat(list(videos), dim=-1)
    write_mp4(path.with_suffix(".mp4"), tiled, fps=8, scale=8)
