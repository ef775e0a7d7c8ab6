"""Which model `scripts.vbench_sample` samples: a `VideoSampler` made from its flags."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.codec import latent_frames
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT
from rcm.evaluation.vbench_samplers import CausalSampler, DescribedSampler, WanSampler
from rcm.evaluation.vbench_sampling import VideoSampler
from rcm.inference.checkpoint_flags import piece_files
from rcm.inference.stream_recipe import CONTEXT, FEW, chosen_recipe, refuse
from rcm.inference.wan_command import frame_size
from rcm.inference.wan_flags import PRECISIONS, TEXT_ENCODER_PATH, VAE_PATH, NetworkFile
from rcm.inference.wan_models import Task, build_pipeline, check_files
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.wan_pipeline import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE, WanPipeline
from rcm.pipelines.wan_ranks import num_ranks
from rcm.pipelines.wan_sizes import FrameSize
from scripts.vbench_flags import causal_recipe, describes_itself, given_or, whole_recipe

PIECES = ("vae_path", "text_encoder_path")
"""Flags of the files beside the network's that decide pixels, too."""


def open_sampler(flags: argparse.Namespace, *, device: torch.device) -> VideoSampler:
    """The sampler of the flags. Collective over the ranks that make a video together. Raises
    `ConfigError` and `CheckpointError` for flags that the model has no use for, and files that are
    missing or do not fit.
    """
    if not Path(flags.dit_path).exists():
        raise CheckpointError(f"--dit_path {flags.dit_path} does not exist")
    if describes_itself(flags.dit_path):
        return _described(flags, device)
    if flags.arch is None and flags.suite == "t2v":
        raise ConfigError(
            f"{flags.dit_path} does not describe itself; say --arch bidirectional or --arch causal"
        )
    return (
        _bidirectional(flags, device) if flags.arch == "bidirectional" else _causal(flags, device)
    )


def _described(flags: argparse.Namespace, device: torch.device) -> DescribedSampler:
    without_use = ("distilled", "mid_t", "negative_prompt", "first_chunk_t", "chunk_t", "size")
    used = [f"--{name}" for name in without_use if getattr(flags, name)]
    if used:
        raise ConfigError(
            f"{flags.dit_path} describes itself, so {', '.join(used)} would have no effect; leave"
            " out what is not needed"
        )
    if flags.cp_size > 1:
        raise ConfigError(
            f"--cp_size {flags.cp_size}: a checkpoint that describes itself is sampled on one rank;"
            " leave it out"
        )
    model = open_checkpoint(
        flags.dit_path,
        weights=flags.weights,
        device=device,
        precision=flags.precision,
        attention=flags.attention,
        files=piece_files(flags),
    )
    kind = "bidirectional" if model.recipe is None else "causal"
    if flags.arch not in (None, kind):
        raise ConfigError(
            f"--arch {flags.arch}: {flags.dit_path} is {kind} (stage {model.description.stage});"
            " leave --arch out"
        )
    return DescribedSampler(
        model,
        weights=flags.weights,
        recipe=chosen_recipe(flags, model.trained_recipe),
        num_frames=flags.num_frames,
        fps=given_or(flags.fps, 0.0),
        ignore_recipe=flags.ignore_recipe,
        files={f"--{name}": vars(flags)[name] for name in PIECES if vars(flags)[name]},
    )


def _bidirectional(flags: argparse.Namespace, device: torch.device) -> WanSampler:
    causal = (*FEW, *CONTEXT, "first_chunk_t", "chunk_t")
    refuse(flags, causal, "belong to --arch causal; leave them out")
    if flags.suite == "i2v":
        raise ConfigError(
            "the image-to-video suite is sampled from causal networks and checkpoints that describe"
            " themselves"
        )
    size, frames = frame_size(flags, None), given_or(flags.num_frames, 81)
    latent_frames(frames, stride=TEMPORAL_STRIDE)
    family = "rcm" if flags.distilled else "diffusion"
    pipeline, files, about = _pipeline(flags, device, size, family=family)
    return WanSampler(
        pipeline,
        recipe=whole_recipe(flags),
        size=size,
        num_frames=frames,
        files=files,
        about=about,
        fps=given_or(flags.fps, 16.0),
        negative_prompt=flags.negative_prompt,
    )


def _causal(flags: argparse.Namespace, device: torch.device) -> CausalSampler:
    size, frames = frame_size(flags, None), given_or(flags.num_frames, 81)
    latents, stride = latent_frames(frames, stride=TEMPORAL_STRIDE), SPATIAL_STRIDE
    recipe = causal_recipe(flags)
    models, files, about = _pipeline(flags, device, size, family="rcm")
    return CausalSampler(
        models,
        recipe=recipe,
        latent_shape=(LATENT_CHANNELS, latents, size.height // stride, size.width // stride),
        negative_prompt=given_or(flags.negative_prompt, NEGATIVE_PROMPT),
        files=files,
        about=about,
        fps=given_or(flags.fps, 16.0),
    )


def _pipeline(
    flags: argparse.Namespace, device: torch.device, size: FrameSize, *, family: str
) -> tuple[WanPipeline, dict[str, str], dict[str, str]]:
    """The models of a Wan file, its files by flag, and what is noted of them."""
    numerics = _wan_flags(flags, device)
    about = {
        "precision": numerics.precision,
        "vae_precision": flags.vae_precision,
        "weights": flags.weights,
    }
    networks, clock = (NetworkFile("--dit_path", flags.dit_path),), PartClock(device)
    check_files(numerics, networks, family=family, task=Task(LATENT_CHANNELS))
    files = {f"--{name}": vars(numerics)[name] for name in ("dit_path", *PIECES)}
    return build_pipeline(numerics, networks, clock=clock, size=size), files, about


def _wan_flags(flags: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """The flags as the Wan commands know them."""
    if flags.precision is not None and flags.precision not in PRECISIONS:
        raise ConfigError(
            f"--precision {flags.precision} is not one of a Wan file's, which are"
            f" {', '.join(PRECISIONS)}"
        )
    if flags.cp_size > 1 and num_ranks() != flags.cp_size:
        raise ConfigError(
            f"--cp_size {flags.cp_size} needs torchrun with a multiple of {flags.cp_size} ranks"
        )
    known = vars(flags) | {
        "precision": flags.precision or "fast",
        "vae_path": flags.vae_path or VAE_PATH,
        "text_encoder_path": flags.text_encoder_path or TEXT_ENCODER_PATH,
        "weights": "live" if flags.weights == "reg" else flags.weights,
        "device": str(device),
        "compile": False,
        "offload": "idle",
        "warmup_iters": 0,
        "vae_tile": None,
        "random_weights": False,
    }
    return argparse.Namespace(**known)
