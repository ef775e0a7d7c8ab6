"""What the causal commands do with their flags: check everything, sample chunk by chunk, decode,
write, tell what it cost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.core.text_file import read_lines
from rcm.encoders.codec import LatentStream, latent_frames
from rcm.encoders.prompt_cleaning import checked_prompts
from rcm.inference.causal_film import Film, FilmWriter, Reel
from rcm.inference.causal_flags import (
    Defaults,
    causal_parser,
    codec_spec_of,
    networks_of,
    recipe_of,
    settle_flags,
)
from rcm.inference.causal_methods import policy_of
from rcm.inference.causal_report import Marks, Stopwatch, Timing, timing_lines, write_causal_report
from rcm.inference.flag_ranges import MAX_FRAMES
from rcm.inference.outcome import check_device
from rcm.inference.wan_command import frame_size, wan_main
from rcm.inference.wan_models import Task, build_pipeline, check_files
from rcm.inference.wan_progress import Progress
from rcm.inference.wan_report import BANNER
from rcm.kernels.fp8_attention.api import WIDTH, obstacle
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Guided
from rcm.nets.kv_memo import MemoisedCodec
from rcm.nets.wan.config import preset
from rcm.parallel.agree import on_first, shared
from rcm.pipelines.image_condition import fit_image, read_image
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.scenes import Timeline, parse_timeline, read_timeline
from rcm.pipelines.stream_spec import StreamSpec
from rcm.pipelines.wan_pipeline import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE, WanPipeline
from rcm.pipelines.wan_ranks import check_ranks, leads, num_ranks
from rcm.pipelines.wan_sizes import FrameSize
from rcm.rollout.recipe import SamplingRecipe


@dataclass(frozen=True)
class CausalJob:
    """What a causal command was asked for, checked: no file but prompts and the image was read."""

    recipe: SamplingRecipe
    codec: KVCodecSpec | None
    timelines: tuple[Timeline, ...]


def causal_main(
    name: str, argv: Sequence[str] | None, *, about: str | None, defaults: Defaults
) -> int:
    """The body of a causal command; returns the exit status."""

    def plan(flags: argparse.Namespace) -> CausalJob:
        settle_flags(flags, defaults)
        if flags.noise_device != "auto":
            check_device(flags.noise_device, knob="--noise_device")
        return CausalJob(recipe_of(flags), codec_spec_of(flags), _timelines(flags))

    return wan_main(causal_parser(name, about=about, defaults=defaults), argv, plan, make=run)


@torch.no_grad()
def run(flags: argparse.Namespace, job: CausalJob, *, clock: PartClock) -> None:
    """Check, make, write, tell. Collective over the ranks of a launch; rank 0 reads, prints and
    writes.
    """
    image = shared(on_first(lambda: read_image(flags.image_path) if flags.image_path else None))
    size, count = frame_size(flags, image), len(job.timelines)
    films = [_film(flags, timeline, job, number) for number, timeline in enumerate(job.timelines)]
    named = flags.preview_grid
    sheets = [
        None if named is None else _numbered(named, i, count, suffix=".png", knob="--preview_grid")
        for i in range(count)
    ]
    report = (
        None
        if flags.report is None
        else _numbered(flags.report, 0, 1, suffix=".json", knob="--report")
    )
    specs = [_stream_spec(flags, job, film, size=size, device=clock.device) for film in films]
    tokens = size.height * size.width // (2 * SPATIAL_STRIDE) ** 2
    networks = networks_of(flags)
    if flags.model_size != "auto":
        check_ranks(
            num_ranks(), num_heads=preset(flags.model_size).num_heads, tokens_per_frame=tokens
        )
    if not flags.random_weights:
        on_first(lambda: check_files(flags, networks, family="causal", task=Task(LATENT_CHANNELS)))
    if leads():
        _say_what_is_made(flags, job, films, specs[0], size)
    maker = Maker(
        flags, job, build_pipeline(flags, networks, clock=clock, size=size), image=image, size=size
    )
    timings = []
    for film, spec, sheet in zip(films, specs, sheets, strict=True):
        with Progress(sys.stdout) if leads() else nullcontext() as progress:
            clock.watch = _watching(progress)
            timings.append(maker.make(film, spec, preview=sheet, progress=progress))
        if leads():
            print(
                "\n".join([*timing_lines(timings[-1], clock), f"wrote {film.target.given}"]),
                flush=True,
            )
    if leads() and report is not None:
        write_causal_report(
            report, flags, job.recipe, job.codec, films, timings, size=size, clock=clock
        )


class Maker:
    """The models of a command, loaded as they are needed, and the videos made with them. Collective
    over the ranks of a launch.
    """

    def __init__(
        self,
        flags: argparse.Namespace,
        job: CausalJob,
        models: WanPipeline,
        *,
        image: Tensor | None,
        size: FrameSize,
    ) -> None:
        self.flags, self.job, self.models, self.size = flags, job, models, size
        prompts = list(
            dict.fromkeys(prompt for timeline in job.timelines for prompt in timeline.prompts)
        )
        guided = job.recipe.kind == "ode" and job.recipe.guidance > 1
        rows = models.embed([*prompts, flags.negative_prompt] if guided else prompts)
        # a last row may be the negative prompt's
        self.embedded = dict(zip(prompts, rows, strict=False))
        self.negative = Condition(rows[-1:]) if guided else None
        self.prefix = None if image is None else models.from_first(lambda: self._encoded(image))

    def make(
        self, film: Film, spec: StreamSpec, *, preview: OutputFile | None, progress: Progress | None
    ) -> Timing:
        """Warm-ups and timed runs of one video, all alike; the last one is written. The network and
        its cache are let go before the last decoding, where the memory policy asks for it.
        """
        flags, models = self.flags, self.models
        reel = self._reel(film, spec, progress)
        timing, count = Timing(film.num_frames), flags.warmup_iters + flags.num_runs
        for number in range(count):
            timed, last = number >= flags.warmup_iters, number == count - 1
            if number == flags.warmup_iters:
                models.clock.restart()
            with ExitStack() as stack:
                writer = FilmWriter(flags, film, preview, stack) if last and leads() else None
                marks, latents = self._sampled(reel, decode=timed, writer=writer)
                if last:
                    timing.cache_bytes, timing.passes = reel.cache_bytes(), reel.passes()
                    reel.close()
                    del reel
                    models.experts[0].network.rest(models.memory.network)
                if timed and leads() and not flags.streaming_vae:
                    self._decode_all(latents, marks, writer, progress)
            if timed:
                timing.runs.append(marks.run(streaming=flags.streaming_vae))
        models.codec.rest(models.memory.codec)
        return timing

    def _reel(self, film: Film, spec: StreamSpec, progress: Progress | None) -> Reel:
        flags = self.flags
        denoiser = self.models.experts[0].network.use()
        denoiser.net.rope.stretch((flags.ntk_t, flags.ntk_h, flags.ntk_w))
        negative = self.negative
        model = (
            denoiser
            if negative is None
            else Guided(denoiser, denoiser.prepare(negative), self.job.recipe.guidance)
        )
        return Reel(denoiser, model, film, spec, given=self.prefix, progress=progress)

    def _sampled(
        self, reel: Reel, *, decode: bool, writer: FilmWriter | None
    ) -> tuple[Marks, list[Tensor]]:
        """Sample once: the latents of all chunks, none where they are decoded as they are made."""
        flags, clock = self.flags, self.models.clock
        marks, latents = Marks(Stopwatch(clock.device), given=0 if self.prefix is None else 1), []
        stream = (
            self.models.codec.use().stream() if decode and flags.streaming_vae and leads() else None
        )
        with clock.part("network"):
            for chunk in reel.chunks(flags, self._condition, marks):
                if stream is not None:
                    self._decode(stream, chunk, marks, writer)
                elif not flags.streaming_vae:
                    latents.append(chunk)
            marks.mark("end")
        return marks, latents

    def _decode_all(
        self,
        latents: list[Tensor],
        marks: Marks,
        writer: FilmWriter | None,
        progress: Progress | None,
    ) -> None:
        stream = self.models.codec.use().stream()
        with self.models.clock.part("decode"):
            if progress is not None:
                progress.part("decode")
            for chunk in latents:
                self._decode(stream, chunk, marks, writer)

    def _decode(
        self, stream: LatentStream, latents: Tensor, marks: Marks, writer: FilmWriter | None
    ) -> None:
        with self.models.clock.part("decode"), marks.decoding():
            frames = stream.decode_chunk(latents)
        if writer is not None:
            with self.models.clock.part("write"):
                writer.append(frames)

    def _condition(self, prompt: str) -> Condition:
        return Condition(self.embedded[prompt][None])

    def _encoded(self, image: Tensor) -> Tensor:
        """The image as one latent frame [1, 16, 1, h, w]."""
        codec = self.models.codec.use()
        with self.models.clock.part("image"):
            latents = codec.encode(fit_image(image.to(self.models.device), self.size))
        del codec
        self.models.codec.rest(self.models.memory.codec)
        return latents


def _watching(progress: Progress | None) -> Callable[[str | None], None]:
    """What follows the parts of a clock; decoding and writing take turns chunk by chunk, too often
    to be told each time.
    """

    def watch(name: str | None) -> None:
        if progress is not None and name not in ("decode", "write"):
            progress.part(name)

    return watch


def _timelines(flags: argparse.Namespace) -> tuple[Timeline, ...]:
    if flags.scene_file is not None:
        return (read_timeline(flags.scene_file),)
    if flags.prompt_file is None:
        return (parse_timeline(flags.prompt),)
    lines = enumerate(read_lines(flags.prompt_file, what="prompt file", knob="--prompt_file"), 1)
    prompts = checked_prompts(
        [(f"line {i} of {flags.prompt_file}", line) for i, line in lines],
        allow_empty=flags.allow_empty_prompt,
    )
    if not prompts:
        raise ConfigError(f"--prompt_file {flags.prompt_file} is empty; write one prompt per line")
    return tuple(map(parse_timeline, prompts))


def _film(flags: argparse.Namespace, timeline: Timeline, job: CausalJob, number: int) -> Film:
    pattern = job.recipe.blocks
    if timeline.is_timed:
        latents = pattern.frames_before(timeline.num_blocks(pattern))
        if latents * TEMPORAL_STRIDE > MAX_FRAMES:
            raise ConfigError(
                f"the durations of the prompts make {latents * TEMPORAL_STRIDE} frames, at most"
                f" {MAX_FRAMES} are made at once"
            )
        if (latents - 1) * TEMPORAL_STRIDE + 1 != flags.num_frames and leads():
            told = f"{(latents - 1) * TEMPORAL_STRIDE + 1} frames by the durations of the prompts"
            print(f"note: {told}; --num_frames {flags.num_frames} is not used", flush=True)
    else:
        latents = _latent_frames(flags.num_frames, job.recipe)
    if flags.image_path and latents < 2:
        raise ConfigError(
            f"--num_frames {flags.num_frames} is the image alone; choose"
            f" {pattern.chunk * TEMPORAL_STRIDE + 1} or more"
        )
    return Film(
        timeline,
        latents,
        _numbered(flags.save_path, number, len(job.timelines), suffix=".mp4", knob="--save_path"),
    )


def _latent_frames(num_frames: int, recipe: SamplingRecipe) -> int:
    """Latent frames of a video; `ConfigError`, naming the nearest lengths in pixel frames, unless
    they fill whole chunks.
    """
    pattern = recipe.blocks
    lengths = [(pattern.frames_before(1) - 1) * TEMPORAL_STRIDE + 1]
    while lengths[-1] < num_frames:
        lengths.append(lengths[-1] + pattern.chunk * TEMPORAL_STRIDE)
    if lengths[-1] != num_frames:
        raise ConfigError(
            f"--num_frames {num_frames} does not fill chunks of {pattern.first}, then"
            f" {pattern.chunk} latent frames ({TEMPORAL_STRIDE} frames each, one frame first);"
            f" choose {' or '.join(map(str, lengths[-2:]))}, or change --first_chunk_t / --chunk_t"
        )
    return latent_frames(num_frames, stride=TEMPORAL_STRIDE)


def _numbered(path: str, number: int, count: int, *, suffix: str, knob: str) -> OutputFile:
    """`path`, or NAME-000 and so on for several videos; looked at by rank 0, known to all."""
    named = (
        path
        if count == 1
        else str(Path(path).with_name(f"{Path(path).stem}-{number:03d}{Path(path).suffix}"))
    )
    return shared(on_first(lambda: OutputFile.claim(named, suffix=suffix, knob=knob)))


def _stream_spec(
    flags: argparse.Namespace, job: CausalJob, film: Film, *, size: FrameSize, device: torch.device
) -> StreamSpec:
    """What each session is opened with. `ConfigError` for what does not go together."""
    cuts = film.timeline.cuts(job.recipe.blocks) if film.timeline.is_timed else frozenset()
    if cuts and flags.extrapolation_method != "infinity_rope" and leads():
        print(
            "note: a # in a duration makes a cut with --extrapolation_method infinity_rope only;"
            " prompts change all the same",
            flush=True,
        )
    policy = policy_of(flags, cuts=cuts, reduce=_summed_over_ranks if num_ranks() > 1 else None)
    keys = "pre_rope" if flags.kv_pre_rope_keys else None
    if job.codec is not None and job.codec.keys_before_rotation and policy.any_keys:
        keys = "pre_rope"
    if keys not in (None, policy.keys) and not policy.any_keys:
        raise ConfigError(
            f"--kv_pre_rope_keys: {flags.extrapolation_method} turns rotated keys on, so they are"
            " cached rotated; leave it out"
        )
    if flags.fp8_attention and (why := obstacle(device, width=WIDTH)) is not None:
        raise ConfigError(f"--fp8_attention is not possible here: {why}; leave it out")
    codec = None if job.codec is None else KVCodec(job.codec)
    noise_device = device if flags.noise_device == "auto" else torch.device(flags.noise_device)
    spec = StreamSpec(
        job.recipe,
        (LATENT_CHANNELS, size.height // SPATIAL_STRIDE, size.width // SPATIAL_STRIDE),
        batch=flags.num_samples,
        num_frames=film.latent_frames,
        seed=flags.seed,
        noise="video",
        generator=torch.Generator(noise_device).manual_seed(flags.seed),
        policy=policy,
        keys=keys,
        kv_codec=MemoisedCodec(codec) if flags.kv_dense_prefix_cache else codec,
        hot_chunks=flags.kv_hot_chunks,
        attention="fp8" if flags.fp8_attention else "net",
        graphs=_graphs(flags, device=device),
    )
    assert spec.cache_frames > 0  # asks the policy, which may refuse the pattern
    return spec


def _graphs(flags: argparse.Namespace, *, device: torch.device) -> str:
    reasons = {
        "--kv_dense_prefix_cache looks up what it restored before, pass by pass": (
            flags.kv_dense_prefix_cache
        ),
        "--kv_hot_chunks codes chunks between passes": flags.kv_hot_chunks > 0,
        "--kv_bias_correction attends chunk by chunk": flags.kv_bias_correction,
        "--no-kv_triton_restore restores in plain torch": not flags.kv_triton_restore,
        "several GPUs share each pass": num_ranks() > 1,
        f"--device {flags.device} has none": device.type != "cuda",
    }
    against = [why for why, holds in reasons.items() if holds]
    if flags.graphs == "on" and against:
        raise ConfigError(f"--graphs on: {against[0]}; use --graphs auto")
    return "off" if against or flags.graphs == "off" else "on"


def _summed_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over the ranks, which hold other heads."""
    total = x.clone()
    dist.all_reduce(total)
    return total


def _say_what_is_made(
    flags: argparse.Namespace,
    job: CausalJob,
    films: Sequence[Film],
    spec: StreamSpec,
    size: FrameSize,
) -> None:
    if flags.random_weights:
        print(BANNER, flush=True)
    recipe = job.recipe
    if recipe.kind == "ode":
        steps = (
            f"{recipe.ode_steps} steps per chunk, shift {recipe.shift:g}, guidance"
            f" {recipe.guidance:g}"
        )
    else:
        steps = f"steps per chunk {' '.join(str(len(entry) + 1) for entry in recipe.mids)}"
    context = (
        f"noisy context from chunk {recipe.noisy_context_start_chunk}"
        if recipe.noisy_context
        else "clean context"
    )
    for film in films:
        print(
            f"{flags.num_samples} x {film.num_frames} frames of {size} (HxW) in"
            f" {recipe.blocks.num_blocks(film.latent_frames)} chunks ({recipe.pattern}); {steps},"
            f" {context}; {flags.extrapolation_method}, cache of {spec.cache_frames} latent frames;"
            f" {num_ranks()} x {flags.device}",
            flush=True,
        )
    if job.codec is None:
        return
    print(job.codec.describe(), flush=True)
    if job.codec.triton_restore and flags.device.startswith("cuda") and find_spec("triton") is None:
        logger.warning(
            "Triton is not installed: quantised keys and values are restored by plain torch, which"
            " is slower"
        )
