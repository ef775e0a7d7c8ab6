"""Streaming in one call: a session over a video of known length, in the noise order of the
release.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rcm.encoders.codec import LatentCodec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import VelocityModel
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamedChunk, StreamReport, StreamSpec
from rcm.rollout.recipe import SamplingRecipe


def bounded(
    denoiser: VelocityModel,
    codec: LatentCodec | None,
    cond: Condition,
    recipe: SamplingRecipe,
    *,
    shape: tuple[int, int, int, int, int],
    generator: torch.Generator,
    prefix: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Session:
    """A session over a video of latent `shape` [B, C, T, h, w] with noise from `generator`;
    `options` of `StreamSpec`.
    """
    batch, channels, frames, height, width = shape
    spec = StreamSpec(
        recipe,
        (channels, height, width),
        batch=batch,
        num_frames=frames,
        noise="video",
        generator=generator,
        **options,
    )
    return Session(denoiser, codec, cond, spec, device=device, prefix=prefix)


def stream_latents(
    denoiser: VelocityModel, cond: Condition, recipe: SamplingRecipe, **options: Any
) -> Iterator[tuple[int, torch.Tensor]]:
    """(block, x0 [B, C, frames, h, w] float32) of `bounded` without a codec."""
    for chunk in bounded(denoiser, None, cond, recipe, **options):
        yield chunk.block, chunk.latents


def stream_video(
    denoiser: VelocityModel,
    codec: LatentCodec,
    cond: Condition,
    recipe: SamplingRecipe,
    **options: Any,
) -> Iterator[StreamedChunk]:
    """The chunks of `bounded`, which begins when the first is asked for; concatenated they equal
    the one-shot decode.
    """
    yield from bounded(denoiser, codec, cond, recipe, **options)


def generate_video(
    denoiser: VelocityModel,
    codec: LatentCodec,
    cond: Condition,
    recipe: SamplingRecipe,
    **options: Any,
) -> tuple[torch.Tensor, StreamReport]:
    """The whole video [B, 3, F, H, W] of `stream_video` and its latency report."""
    report, frames = StreamReport(), []
    for chunk in stream_video(denoiser, codec, cond, recipe, **options):
        report.add(chunk)
        frames.append(chunk.frames)
    return torch.cat(frames, dim=2), report
