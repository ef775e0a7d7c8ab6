"""What a stream is (`StreamSpec`), what it hands out (`StreamedChunk`), and what it took
(`StreamReport`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import Record, require_kind, within
from rcm.core.rng import require_seed
from rcm.nets.condition import Condition
from rcm.nets.kv_coded import KVCodec
from rcm.nets.kv_view import Attention, Keys
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.noise import ChunkNoise, Noise, VideoNoise
from rcm.rollout.plan import ChunkPlan
from rcm.rollout.recipe import SamplingRecipe

SwitchMode = Literal["keep", "recache"]
AS_TRAINED = CachePolicy()
"""In place of a policy: that of the recipe."""


class StreamCancelled(RuntimeError):
    """A step was asked of a session that is closed, or was cancelled meanwhile."""


class SwitchRefused(ConfigError):
    """A change of condition that cannot be; the stream goes on under the old one."""


@dataclass(frozen=True)
class StreamedChunk:
    """One chunk of a stream, or a part of one: its block, latents [B, C, frames, H, W] and decoded
    pixels [B, 3, pixel frames, H', W'] in [-1, 1].

    `seconds` since the stream was opened, after the pixels are ready. `images`: the pixels as uint8
    [B, pixel frames, H', W', 3] in host memory, where the session was asked for them.
    """

    block: int
    latents: Tensor
    frames: Tensor
    seconds: float
    images: Tensor | None = None


@dataclass
class StreamReport:
    """Latency of a stream, in seconds: first chunk, gaps between later chunks, and frames per
    second over the whole stream.
    """

    chunk_seconds: list[float] = field(default_factory=list)
    num_frames: int = 0

    def add(self, chunk: StreamedChunk) -> None:
        """Record a chunk in order of arrival."""
        self.chunk_seconds.append(chunk.seconds)
        self.num_frames += chunk.frames.shape[2]

    @property
    def first_chunk(self) -> float:
        """Seconds until the first pixels."""
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


@dataclass
class Receipt:
    """A change of condition: the block from which it applies, None while it waits; `superseded` by
    a later one that came first; `refused` says why it cannot be.
    """

    applied_at: int | None = None
    superseded: bool = False
    refused: str = ""


@dataclass(frozen=True)
class StreamSpec(Record):
    """What a stream is, beside its network and its condition.

    recipe        steps, context rule, block pattern.
    latent        (C, h, w) of a latent frame; `batch` videos in step.
    num_frames    latent frames, given ones included; None: without end.
    noise         "chunk": keyed by `seed` and chunk. "video": the release's order, all of it drawn
                  up front by `generator` (default: one seeded with `seed` on `draw_on`); needs
                  `num_frames`.
    policy        what the cache keeps (default: as the recipe says); a stream without end needs one
                  that bounds it. `kv_codec`, `hot_chunks`: how it is stored.
    keys          stored before or after rotation; None: as the policy wants. Quantised keys are
                  better off unrotated.
    attention     over the cache: "net", by the network's back end, or "fp8", over codes kept beside
                  a plain cache (H100, H200; inexact).
    graphs        "on": passes are captured as CUDA graphs and replayed; "off": launched one by one,
                  the reference.
    look_ahead    the next chunk is denoised while this one is decoded (on CUDA, on a stream of its
                  own). A change of condition then applies one chunk later.
    first_alone   the first latent frame is decoded and handed out before the rest of its chunk.
    to_host       chunks carry `images` in pinned host memory.
    decode_ranks  of the ranks that make a stream together, how many decode (the Wan decoder in
                  stages, one per rank); None: up to four. Only rank 0 has pixels.
    settled       a step leaves the context of its chunk in the cache, too, and not the step after
                  it: for timings. The last chunk leaves none.
    """

    recipe: SamplingRecipe
    latent: tuple[int, int, int]
    batch: int = 1
    num_frames: int | None = None
    seed: int = 0
    noise: Literal["chunk", "video"] = "chunk"
    generator: torch.Generator | None = None
    draw_on: torch.device | str = "cpu"
    policy: CachePolicy = AS_TRAINED
    keys: Keys | None = None
    attention: Attention = "net"
    kv_codec: KVCodec | None = None
    hot_chunks: int = within(0, least=0)
    graphs: Literal["on", "off"] = "off"
    look_ahead: bool = False
    first_alone: bool = False
    to_host: bool = False
    decode_ranks: int | None = within(None, least=1)
    settled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed(self.seed, knob="seed=")
        if self.policy is AS_TRAINED:
            object.__setattr__(self, "policy", self.recipe.policy)
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch} must be at least 1 video")
        if self.hot_chunks and self.kv_codec is None:
            raise ConfigError(
                f"hot_chunks={self.hot_chunks} keeps chunks of a quantised cache plain, and this"
                " one is; give kv_codec, or 0"
            )
        if self.attention == "fp8" and self.kv_codec is not None:
            raise ConfigError(
                "attention='fp8' keeps FP8 codes of its own beside a plain cache; leave out"
                " kv_codec, or attention"
            )
        if self.keys not in (None, self.policy.keys) and not self.policy.any_keys:
            raise ConfigError(
                f"{type(self.policy).__name__} needs keys={self.policy.keys!r}, got {self.keys!r};"
                " leave keys out"
            )
        if self.generator is not None and self.noise != "video":
            raise ConfigError(
                f"generator= draws noise='video' only, got noise={self.noise!r}, which is keyed by"
                " seed; leave generator out"
            )
        for chunk in range(len(self.recipe.mids)):
            self.recipe.plan(chunk)  # raises for times that cannot be walked
        if self.num_frames is None and self.noise == "video":
            raise ConfigError(
                "noise='video' draws the noise of a whole video up front; give num_frames, or"
                " noise='chunk'"
            )
        if self.num_frames is None and self.policy.capacity_frames(self.recipe.blocks) is None:
            raise ConfigError(
                "a stream without end needs a policy that bounds its cache, such as a window of"
                " blocks; or give num_frames"
            )
        if self.num_frames is not None:
            self.recipe.blocks.num_blocks(self.num_frames)

    @property
    def cache_frames(self) -> int:
        """Latent frames that the cache has room for."""
        bound = self.policy.capacity_frames(self.recipe.blocks)
        return min(n for n in (bound, self.num_frames) if n is not None)

    def with_recipe(self, recipe: SamplingRecipe, *, block: int, given: int) -> StreamSpec:
        """The stream sampled by `recipe` from `block` on, behind so many `given` blocks.
        `ConfigError` for one that a stream under way cannot take up.
        """
        require_kind("recipe", recipe, SamplingRecipe)
        for name in ("pattern", "kind", "guidance", "window", "sinks"):
            mine, new = getattr(self.recipe, name), getattr(recipe, name)
            if mine != new:
                raise ConfigError(
                    f"a stream under way keeps its {name}={mine!r}, the new recipe has {new!r};"
                    " open another session"
                )
        if self.noise == "video":
            raise ConfigError(
                "noise='video' was drawn for the steps of the first recipe; open the session with"
                " noise='chunk'"
            )
        # raises for times that do not decrease
        recipe.plan(max(block, given), prefix_blocks=given)
        return replace(self, recipe=recipe)

    def ends_with(self, block: int) -> bool:
        """Whether `block` is the last."""
        frames = self.num_frames
        return frames is not None and self.recipe.blocks.frames_before(block + 1) >= frames

    def given_chunk(self, block: int, *, given: int) -> tuple[ChunkPlan, float]:
        """Frames of `block`, one of `given` blocks, as a plan, and the time of its context: with
        noisy context the last of the first generated chunk.
        """
        recipe, blocks = self.recipe, self.recipe.blocks
        first = recipe.plan(given, prefix_blocks=given)
        start, stop = blocks.frames_before(block), blocks.frames_before(block + 1)
        noisy = recipe.noisy_context and block >= recipe.noisy_context_start_chunk
        plan = replace(first, block=block, start=start, stop=stop)
        return plan, first.times[-2] if noisy else 0.0

    def given(self, prefix: Tensor | None, *, device: torch.device) -> tuple[int, Tensor | None]:
        """Blocks of `prefix` [1 or batch, C, k, h, w] and its latents for the whole batch, float64,
        in memory of their own. `ConfigError` for another shape, or a k that ends within a block.
        """
        if prefix is None:
            return 0, None
        check_prefix(prefix, batch=self.batch, latent=self.latent)
        blocks = count_prefix_blocks(self.recipe, prefix.shape[2], self.num_frames)
        return blocks, prefix.to(device, torch.float64, copy=True).expand(
            self.batch, -1, -1, -1, -1
        )

    def for_batch(self, cond: Condition) -> Condition:
        """`cond` of a batch of 1 for all videos. `ConfigError` for another batch."""
        require_kind("cond", cond, Condition)
        if cond.batch not in (1, self.batch):
            raise ConfigError(
                f"the condition has batch {cond.batch}, the stream {self.batch}; give a batch of 1"
                f" or {self.batch}"
            )
        return cond.expand(self.batch)

    def new_noise(self, prefix_blocks: int, *, device: torch.device) -> Noise:
        """The noise of a video that begins now, behind so many given blocks. `ConfigError` where
        `draw_on` is no device that draws.
        """
        try:
            drawn = self.generator or torch.Generator(device=self.draw_on)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"draw_on={str(self.draw_on)!r} is no device that draws random numbers here; use"
                " 'cpu'"
            ) from error
        channels, *sides = self.latent
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        if self.num_frames is None or self.noise == "chunk":
            shape = (self.batch, *self.latent)
            return ChunkNoise(shape, seed=self.seed, draw_on=self.draw_on, **options)
        return VideoNoise.for_plans(
            self.recipe.plans(self.num_frames, prefix_blocks=prefix_blocks),
            (self.batch, channels, self.num_frames, *sides),
            generator=self.generator or drawn.manual_seed(self.seed),
            renoises=self.recipe.rule.needs_noise,
            **options,
        )


def check_prefix(prefix: Tensor, *, batch: int, latent: tuple[int, int, int]) -> None:
    """`ConfigError` unless `prefix` is finite latents [1 or batch, C, k, h, w] of `latent`
    (C, h, w).
    """
    require_kind("prefix", prefix, Tensor)
    fits = (
        prefix.ndim == 5
        and prefix.shape[0] in (1, batch)
        and (prefix.shape[1], *prefix.shape[3:]) == tuple(latent)
        and prefix.is_floating_point()
    )
    if not fits:
        channels, height, width = latent
        raise ConfigError(
            f"prefix must be [1 or {batch}, {channels}, k, {height}, {width}] latents, got"
            f" {prefix.dtype} {list(prefix.shape)}"
        )
    if not bool(prefix.isfinite().all()):
        raise ConfigError(
            "prefix has NaN or infinite values; look at the given frames, and at the weights and"
            " the precision of the codec that encoded them (--vae_precision)"
        )


def count_prefix_blocks(recipe: SamplingRecipe, prefix_frames: int, num_frames: int | None) -> int:
    """Blocks covered by `prefix_frames` given latent frames; `ConfigError` unless they end on a
    block and leave something to generate.
    """
    if prefix_frames == 0:
        return 0
    if num_frames is None:
        num_frames = prefix_frames + recipe.blocks.first + recipe.blocks.chunk
        ends = [
            end
            for block in range(num_frames)
            if (end := recipe.blocks.frames_before(block + 1)) <= num_frames
        ]
    else:
        ends = [stop for _, stop in recipe.blocks.bounds(num_frames)]
    if prefix_frames not in ends[:-1]:
        choices = (
            f"give {', '.join(map(str, ends[:-1]))} latent frames"
            if ends[:-1]
            else "make the video longer"
        )
        raise ConfigError(
            f"{prefix_frames} given latent frames do not end on a block of pattern {recipe.pattern}"
            f" over {num_frames} frames; {choices}, or change first_chunk_t / chunk_t"
        )
    return ends.index(prefix_frames) + 1
