"""Which model `scripts.vbench_sample` samples: a `VideoSampler` made from its flags."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.codec import latent_frames
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.encoders.wan_vae import WanVAECodec
from rcm.evaluation.vbench_samplers import CausalSampler, DescribedSampler, WanSampler
from rcm.evaluation.vbench_sampling import VideoSampler
from rcm.inference.stream_recipe import chosen_recipe
from rcm.inference.wan_command import frame_size
from rcm.inference.wan_flags import PRECISIONS, TEXT_ENCODER_PATH, VAE_PATH, NetworkFile
from rcm.inference.wan_models import VAE_DTYPES, Task, build_pipeline, check_files
from rcm.pipelines.described import PieceFiles
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.wan_files import load_wan
from rcm.pipelines.wan_pipeline import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE
from rcm.pipelines.wan_ranks import num_ranks, share_tokens
from scripts.vbench_flags import (
    FEW_STEP_FLAGS,
    causal_recipe,
    describes_itself,
    given_or,
    refuse,
    whole_recipe,
)


def open_sampler(flags: argparse.Namespace, *, device: torch.device) -> VideoSampler:
    """The sampler of the flags. Collective over the ranks that make a video together. Raises
    `ConfigError` and `CheckpointError` for flags that the model has no use for, and files that are
    missing or do not fit.
    """
    if flags.fps is not None and not 0 < flags.fps < math.inf:
        raise ConfigError(f"--fps {flags.fps:g} must be positive and finite")
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
    files = PieceFiles(
        vae=flags.vae_path,
        text_encoder=flags.text_encoder_path,
        tokenizer=flags.tokenizer_path,
        text_cache=flags.text_cache,
    )
    model = open_checkpoint(
        flags.dit_path,
        weights=flags.weights,
        device=device,
        precision=flags.precision,
        attention=flags.attention,
        files=files,
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
        fps=flags.fps,
        ignore_recipe=flags.ignore_recipe,
    )


def _bidirectional(flags: argparse.Namespace, device: torch.device) -> WanSampler:
    causal = (*FEW_STEP_FLAGS, "first_chunk_t", "chunk_t")
    refuse(flags, causal, "belong to --arch causal; leave them out")
    if flags.suite == "i2v":
        raise ConfigError(
            "the image-to-video suite is sampled from causal networks and checkpoints that describe"
            " themselves"
        )
    size, frames = frame_size(flags, None), given_or(flags.num_frames, 81)
    latent_frames(frames, stride=TEMPORAL_STRIDE)
    numerics = _wan_flags(flags, device)
    networks = (NetworkFile("--dit_path", flags.dit_path),)
    check_files(
        numerics,
        networks,
        family="rcm" if flags.distilled else "diffusion",
        task=Task(LATENT_CHANNELS),
    )
    pipeline = build_pipeline(numerics, networks, clock=PartClock(device), size=size)
    return WanSampler(
        pipeline,
        recipe=whole_recipe(flags),
        size=size,
        num_frames=frames,
        files={"--dit_path": flags.dit_path},
        about={
            "precision": numerics.precision,
            "vae_precision": flags.vae_precision,
            "weights": flags.weights,
        },
        fps=given_or(flags.fps, 16.0),
        negative_prompt=flags.negative_prompt,
    )


def _causal(flags: argparse.Namespace, device: torch.device) -> CausalSampler:
    size, frames = (
        frame_size(flags, None),
        latent_frames(given_or(flags.num_frames, 81), stride=TEMPORAL_STRIDE),
    )
    recipe = causal_recipe(flags)
    numerics = _wan_flags(flags, device)
    check_files(
        numerics,
        (NetworkFile("--dit_path", flags.dit_path),),
        family="rcm",
        task=Task(LATENT_CHANNELS),
    )
    choice = PRECISIONS[numerics.precision]
    denoiser = load_wan(
        flags.dit_path,
        expect=None if flags.model_size == "auto" else flags.model_size,
        weights=numerics.weights,
        device=device,
        precision=Precision.preset(choice.precision),
        attention=flags.attention,
    )
    denoiser.net.set_fused(choice.fused)
    return CausalSampler(
        share_tokens(denoiser, tokens_per_frame=size.height * size.width // 256),
        text=UMT5TextEncoder.from_files(
            numerics.text_encoder_path,
            tokenizer=flags.tokenizer_path,
            device=device,
            cache=flags.text_cache,
        ),
        codec=WanVAECodec.from_file(
            numerics.vae_path, device=device, dtype=VAE_DTYPES[flags.vae_precision]
        ),
        recipe=recipe,
        latent_shape=(
            LATENT_CHANNELS,
            frames,
            size.height // SPATIAL_STRIDE,
            size.width // SPATIAL_STRIDE,
        ),
        negative_prompt=flags.negative_prompt,
        file=flags.dit_path,
        about={
            "precision": numerics.precision,
            "vae_precision": flags.vae_precision,
            "weights": flags.weights,
        },
        device=device,
        fps=given_or(flags.fps, 16.0),
    )


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
