"""Streaming in one call: a session over a video of known length, in the noise order of the
release.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rcm.encoders.codec import LatentCodec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import VelocityModel
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamedChunk, StreamReport, StreamSpec
from rcm.rollout.recipe import SamplingRecipe


def stream_latents(
    denoiser: VelocityModel, cond: Condition, recipe: SamplingRecipe, **options: Any
) -> Iterator[tuple[int, Tensor]]:
    """(block, x0 [B, C, frames, h, w] float32) of `stream_video` without a codec."""
    for chunk in stream_video(denoiser, None, cond, recipe, **options):
        yield chunk.block, chunk.latents


def stream_video(
    denoiser: VelocityModel,
    codec: LatentCodec | None,
    cond: Condition,
    recipe: SamplingRecipe,
    *,
    shape: tuple[int, int, int, int, int],
    generator: torch.Generator,
    prefix: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Iterator[StreamedChunk]:
    """The chunks of a video of latent `shape` [B, C, T, h, w] with noise from `generator`, by a
    session that begins when the first chunk is asked for; `options` of `StreamSpec`, checked now.
    Concatenated they equal the one-shot decode.
    """
    batch, channels, frames, height, width = shape
    latent = (channels, height, width)
    drawn: dict[str, Any] = {"noise": "video", "generator": generator}
    spec = StreamSpec(recipe, latent, batch=batch, num_frames=frames, **drawn, **options)
    spec.given(prefix, device=torch.device(device))

    def chunks() -> Iterator[StreamedChunk]:
        with Session(denoiser, codec, cond, spec, device=device, prefix=prefix) as session:
            yield from session

    return chunks()


def collected(chunks: Iterable[StreamedChunk]) -> tuple[Tensor, StreamReport]:
    """The pixels of all chunks in a row, and when they came."""
    report, frames = StreamReport(), []
    for chunk in chunks:
        report.add(chunk)
        frames.append(chunk.frames)
    return torch.cat(frames, dim=2), report
