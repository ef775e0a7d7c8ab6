"""Streaming generation: chunks of decoded video as soon as they exist, with bounded memory and measured latencies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from rcm.core.errors import ConfigError
from rcm.encoders.codec import LatentCodec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.rollout.autoregressive import Canvas, prefill, rollout
from rcm.rollout.noise import VideoNoise
from rcm.rollout.recipe import SamplingRecipe


@dataclass(frozen=True)
class StreamedChunk:
    """One chunk of a stream: its block, latents [B, C, frames, H, W] and decoded pixels [B, 3, pixel frames, H', W'] in [-1, 1].

    `seconds` since the stream was asked for, after the pixels of this chunk are ready.
    """

    block: int
    latents: torch.Tensor
    frames: torch.Tensor
    seconds: float


@dataclass
class StreamReport:
    """Latency of a stream, in seconds: first chunk, gaps between later chunks, and frames per second over the whole stream."""

    chunk_seconds: list[float] = field(default_factory=list)
    num_frames: int = 0

    def add(self, chunk: StreamedChunk) -> None:
        """Record a chunk in order of arrival."""
        self.chunk_seconds.append(chunk.seconds)
        self.num_frames += chunk.frames.shape[2]

    @property
    def first_chunk(self) -> float:
        """Seconds until the first chunk's pixels."""
        return self.chunk_seconds[0]

    @property
    def later_chunks(self) -> float:
        """Mean seconds between later chunks (0 for a single chunk)."""
        times = self.chunk_seconds
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0

    @property
    def fps(self) -> float:
        """Pixel frames per second over the whole stream."""
        return self.num_frames / max(self.chunk_seconds[-1], 1e-9)


def count_prefix_blocks(recipe: SamplingRecipe, prefix_frames: int, num_frames: int) -> int:
    """Blocks covered by `prefix_frames` given latent frames; `ConfigError` unless they end on a block and leave something to generate."""
    ends = [stop for _, stop in recipe.blocks.bounds(num_frames)]
    if prefix_frames == 0:
        return 0
    if prefix_frames not in ends[:-1]:
        choices = f"give {', '.join(map(str, ends[:-1]))} latent frames" if ends[:-1] else "make the video longer"
        raise ConfigError(
            f"{prefix_frames} given latent frames do not end on a block of pattern {recipe.pattern} over {num_frames} frames; "
            f"{choices}, or change first_chunk_t / chunk_t"
        )
    return ends.index(prefix_frames) + 1


@torch.no_grad()
def stream_latents(
    denoiser: Denoiser,
    cond: Condition,
    recipe: SamplingRecipe,
    *,
    shape: tuple[int, int, int, int, int],
    generator: torch.Generator,
    prefix: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (block, x0 [B, C, frames, H, W] float32) of a video of latent `shape` [B, C, T, H, W].

    `prefix` [B, C, k, H, W]: given first frames (an image, or the start of a clip), entered as clean context and yielded unchanged. With
    noisy context from block 0 the prefix is noised to the first generated chunk's last time (spec/causal_inference 2, I2V). State in
    float64.
    """
    given = 0 if prefix is None else count_prefix_blocks(recipe, prefix.shape[2], shape[2])
    plans = recipe.plans(shape[2], prefix_blocks=given)
    canvas = Canvas(shape[2], denoiser.token_grid(shape[3], shape[4]), recipe.blocks)
    noise = VideoNoise.for_plans(plans, shape, generator=generator, dtype=torch.float64, device=device, renoises=recipe.rule.needs_noise)
    cache = denoiser.new_cache(num_frames=shape[2], grid=canvas.grid)
    for block, (start, stop) in enumerate(recipe.blocks.bounds(shape[2])[:given]):
        x = prefix[:, :, start:stop].to(device, torch.float64)
        yield block, x.float()
        t = plans[0].times[-2] if recipe.noisy_context and block >= recipe.noisy_context_start_chunk else 0.0
        context = (1.0 - t) * x + t * noise.context(slice(start, stop)) if t > 0 else x
        prefill(denoiser, cond, context, t=t, block=block, canvas=canvas, cache=cache)
    for result in rollout(
        denoiser, cond, plans, canvas=canvas, noise=noise, rule=recipe.rule, cache=cache, in_place=True, commit_last=False
    ):
        yield result.plan.block, result.x0.float()


@torch.no_grad()
def stream_video(
    denoiser: Denoiser,
    codec: LatentCodec,
    cond: Condition,
    recipe: SamplingRecipe,
    *,
    shape: tuple[int, int, int, int, int],
    generator: torch.Generator,
    prefix: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[StreamedChunk]:
    """`stream_latents` with each chunk decoded by the codec's streaming decoder; concatenated chunks equal the one-shot decode."""
    begin = time.perf_counter()
    decoder = codec.stream()
    for block, latents in stream_latents(denoiser, cond, recipe, shape=shape, generator=generator, prefix=prefix, device=device):
        frames = decoder.decode_chunk(latents)
        if frames.is_cuda:
            torch.cuda.synchronize(frames.device)
        yield StreamedChunk(block, latents, frames, time.perf_counter() - begin)


def generate_video(denoiser, codec, cond, recipe, **options) -> tuple[torch.Tensor, StreamReport]:
    """The whole video [B, 3, F, H, W] of `stream_video` and its latency report."""
    report, frames = StreamReport(), []
    for chunk in stream_video(denoiser, codec, cond, recipe, **options):
        report.add(chunk)
        frames.append(chunk.frames)
    return torch.cat(frames, dim=2), report
