"""What the causal commands do with their flags: check everything, sample chunk by chunk, decode,
write, tell what it cost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from loguru import logger
from torch import Tensor

from rcm.encoders.codec import LatentCodec, LatentStream
from rcm.inference.causal_film import Film, Reel, film_of, timelines_of
from rcm.inference.causal_flags import (
    Defaults,
    causal_parser,
    codec_spec_of,
    recipe_of,
    settle_flags,
    stream_spec_of,
)
from rcm.inference.causal_report import Marks, Stopwatch, Timing, timing_lines, write_causal_report
from rcm.inference.outcome import check_device
from rcm.inference.wan_command import check_beside, frame_size, wan_main
from rcm.inference.wan_flags import single_network
from rcm.inference.wan_models import Task, open_pipeline
from rcm.inference.wan_outputs import VideoWriter, claimed
from rcm.inference.wan_progress import Progress
from rcm.inference.wan_report import BANNER
from rcm.kernels.kv_codec.spec import KVCodecSpec
from rcm.nets.condition import Condition
from rcm.nets.denoiser import guided
from rcm.parallel.agree import on_first, shared
from rcm.pipelines.image_condition import fit_image, read_image
from rcm.pipelines.models import Models
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.scenes import Timeline
from rcm.pipelines.stream_spec import StreamSpec
from rcm.pipelines.wan_pipeline import LATENT_CHANNELS
from rcm.pipelines.wan_ranks import leads, num_ranks
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
        return CausalJob(recipe_of(flags), codec_spec_of(flags), timelines_of(flags))

    return wan_main(causal_parser(name, about=about, defaults=defaults), argv, plan, make=run)


@torch.no_grad()
def run(flags: argparse.Namespace, job: CausalJob, *, clock: PartClock) -> None:
    """Check, make, write, tell. Collective over the ranks of a launch; rank 0 reads, prints and
    writes.
    """
    image = shared(on_first(lambda: read_image(flags.image_path) if flags.image_path else None))
    size, count = frame_size(flags, image), len(job.timelines)
    check_beside(size, count=flags.num_samples)
    films = [
        film_of(flags, timeline, job.recipe.blocks, number=number, count=count)
        for number, timeline in enumerate(job.timelines)
    ]
    report = claimed(flags, "report", ".json")
    specs = [_spec(flags, job, film, size=size, device=clock.device) for film in films]
    task = Task(LATENT_CHANNELS)
    models = open_pipeline(
        flags, single_network(flags), family="causal", task=task, clock=clock, size=size
    )
    if leads():
        _say_what_is_made(flags, job, films, specs[0], size)
    maker = Maker(flags, job, models, image=image, size=size)
    timings = []
    for film, spec in zip(films, specs, strict=True):
        with Progress(sys.stdout) if leads() else nullcontext() as progress:
            clock.watch = _watching(progress)
            timings.append(maker.make(film, spec, progress=progress))
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
        models: Models,
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
        # not strict: a last row may be the negative prompt's
        self.embedded = dict(zip(prompts, rows, strict=False))
        self.negative = Condition(rows[-1:]) if guided else None
        self.prefix = None if image is None else models.from_first(lambda: self._encoded(image))

    def make(self, film: Film, spec: StreamSpec, *, progress: Progress | None) -> Timing:
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
            with self._writer(film) if last and leads() else nullcontext() as writer:
                marks, latents = self._sampled(reel, decode=timed, writer=writer)
                if last:
                    timing.cache_bytes, timing.passes = reel.cache_bytes(), reel.passes()
                    reel.close()
                    del reel
                    models.rest_networks()
                if timed and leads() and not flags.streaming_vae:
                    self._decode_all(latents, marks, writer, progress)
            if timed:
                timing.runs.append(marks.run(streaming=flags.streaming_vae))
        models.codec.rest(models.memory.codec)
        return timing

    def _writer(self, film: Film) -> VideoWriter:
        return VideoWriter(
            film.target,
            film.preview,
            flags=self.flags,
            num_frames=film.num_frames,
            prompt=film.timeline.prompts[0],
        )

    def _reel(self, film: Film, spec: StreamSpec, progress: Progress | None) -> Reel:
        flags, denoiser = self.flags, self.models.denoiser
        denoiser.net.rope.stretch((flags.ntk_t, flags.ntk_h, flags.ntk_w))
        negative = None if self.negative is None else partial(denoiser.prepare, self.negative)
        model = guided(denoiser, negative, self.job.recipe.guidance)
        return Reel(denoiser, model, film, spec, self.prefix, progress)

    def _sampled(
        self, reel: Reel, *, decode: bool, writer: VideoWriter | None
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
        writer: VideoWriter | None,
        progress: Progress | None,
    ) -> None:
        stream = self.models.codec.use().stream()
        with self.models.clock.part("decode"):
            if progress is not None:
                progress.part("decode")
            for chunk in latents:
                self._decode(stream, chunk, marks, writer)

    def _decode(
        self, stream: LatentStream, latents: Tensor, marks: Marks, writer: VideoWriter | None
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
        models = self.models

        def encoded(codec: LatentCodec) -> Tensor:
            with models.clock.part("image"):
                return codec.encode(fit_image(image.to(models.device), self.size))

        return models.codec.lend(encoded, then=models.memory.codec)


def _watching(progress: Progress | None) -> Callable[[str | None], None]:
    """What follows the parts of a clock; decoding and writing take turns chunk by chunk, too often
    to be told each time.
    """

    def watch(name: str | None) -> None:
        if progress is not None and name not in ("decode", "write"):
            progress.part(name)

    return watch


def _spec(
    flags: argparse.Namespace, job: CausalJob, film: Film, *, size: FrameSize, device: torch.device
) -> StreamSpec:
    cuts = film.cuts(job.recipe.blocks)
    if cuts and flags.extrapolation_method != "infinity_rope" and leads():
        print(
            "note: a # in a duration makes a cut with --extrapolation_method infinity_rope only;"
            " prompts change all the same",
            flush=True,
        )
    return stream_spec_of(
        flags,
        job.recipe,
        job.codec,
        num_frames=film.latent_frames,
        cuts=cuts,
        size=size,
        device=device,
    )


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
