"""What the Wan commands do with their flags: check everything, build the pipeline, make the video,
write it, tell what it cost.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.encoders.prompt_cleaning import checked_prompts
from rcm.inference.outcome import OutOfMemory, check_device, exit_status, out_of_memory
from rcm.inference.wan_flags import NetworkFile
from rcm.inference.wan_models import Task, open_pipeline
from rcm.inference.wan_outputs import VideoWriter, claimed
from rcm.inference.wan_progress import Progress
from rcm.inference.wan_report import BANNER, cost_lines, write_report
from rcm.nets.attention import resolve
from rcm.parallel.agree import on_first, shared
from rcm.parallel.launch import is_first, launch_number, this_launch
from rcm.parallel.mesh import process_group
from rcm.pipelines.image_condition import image_size, read_image
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.pipelines.video_io import check_frame
from rcm.pipelines.wan_pipeline import GeneratedVideo, VideoRequest, WanPipeline
from rcm.pipelines.wan_ranks import leads, num_ranks
from rcm.pipelines.wan_sizes import FrameSize, adaptive_size, table_size, written_size

MAX_PIXELS_GIB = 64
"""Of the float32 pixels of a request; 81 frames at 480p are 0.4."""


@dataclass(frozen=True)
class Job:
    """What a command asks for beyond the flags that all share. `family` "rcm" or "diffusion": whose
    files it samples.
    """

    family: str
    recipe: WholeVideoRecipe
    networks: tuple[NetworkFile, ...]
    negative_prompt: str | None = None
    image_path: str | None = None
    last_image_path: str | None = None
    clip_path: str | None = None


def wan_main(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    plan: Callable[[argparse.Namespace], Any],
    *,
    make: Callable[..., None] | None = None,
) -> int:
    """The body of a command: exit status 0, or 2 and one sentence for what the user can put right.

    `plan` checks the flags and says what they ask for, `make(flags, job, clock=clock)` does it
    (`run` for the bidirectional commands).
    """
    tell = is_first() and leads()
    work = lambda: _launch(parser.parse_args(argv), plan, make or run)  # noqa: E731
    return exit_status(work, tell=tell, log="INFO")


def _launch(
    flags: argparse.Namespace, plan: Callable[[argparse.Namespace], Any], make: Callable[..., None]
) -> None:
    _check_flags(flags)
    job = plan(flags)
    with _device(flags.device) as device:
        clock = PartClock(device)
        with _out_of_memory_told(flags, clock):
            make(flags, job, clock=clock)


@contextmanager
def _device(name: str) -> Iterator[torch.device]:
    """The device of this rank; under torchrun inside a process group."""
    if not dist.is_initialized() and not this_launch().launched:
        yield torch.device(name)
        return
    with process_group(torch.device(name).type) as device:
        yield device


@contextmanager
def _out_of_memory_told(flags: argparse.Namespace, clock: PartClock) -> Iterator[None]:
    """Turn an allocation that failed into a sentence about flags."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        knobs = ["--num_samples 1"] if flags.num_samples > 1 else []
        knobs += ["--offload low"] if flags.offload != "low" else []
        knobs += ["--vae_tile 256"] if flags.vae_tile is None else []
        knobs += [
            "a smaller --resolution or --size",
            "fewer --num_frames",
            "several GPUs (torchrun --nproc_per_node=N)",
        ]
        where = "" if clock.interrupted is None else f" in the part {clock.interrupted!r}"
        told = str(error).splitlines()[0][:160]
        raise OutOfMemory(
            f"out of memory on {flags.device}{where}: {told} Try {', '.join(knobs)}"
        ) from error


def _check_flags(flags: argparse.Namespace) -> None:
    if flags.vae_tile is not None and flags.vae_tile % 8:
        raise ConfigError(f"--vae_tile {flags.vae_tile} must be a multiple of 8 pixels")
    [flags.prompt] = checked_prompts(
        [("--prompt", flags.prompt)], allow_empty=flags.allow_empty_prompt
    )
    if getattr(flags, "negative_prompt", None) is not None:
        [flags.negative_prompt] = checked_prompts(
            [("--negative_prompt", flags.negative_prompt)], allow_empty=True
        )
    if flags.random_weights and flags.model_size == "auto":
        raise ConfigError(
            "--random_weights reads no file, so --model_size auto has nothing to go by; name a size"
        )
    if flags.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "there is no CUDA device here; --device cpu runs without one, but slowly: a forward of"
            " the 1.3B network over 81 frames at 480p is 283 TFLOP, many minutes per step (a first"
            " try: --device cpu --size 160x272 --num_frames 9)"
        )
    check_device(flags.device)
    if "RANK" in os.environ:
        _check_launch(flags.device)
    resolve(flags.attention)


def _check_launch(device: str) -> None:
    """Under torchrun every rank has a GPU of its own."""
    if ":" in device:
        raise ConfigError(
            f"--device {device}: under torchrun every rank takes its own GPU; write --device cuda"
        )
    launch, here = this_launch(), launch_number("LOCAL_WORLD_SIZE", 1)
    shared_cards = device == "cuda" and launch.world_size > 1 and not launch.sees_its_own()
    if shared_cards and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} ranks on a machine with {torch.cuda.device_count()} GPUs; lower"
            " --nproc_per_node"
        )


def run(flags: argparse.Namespace, job: Job, *, clock: PartClock) -> None:
    """Check, make, write, tell. Collective over the ranks of a launch; rank 0 reads, prints and
    writes.
    """
    video, preview, report = (
        claimed(flags, name, suffix)
        for name, suffix in (("save_path", ".mp4"), ("preview_grid", ".png"), ("report", ".json"))
    )
    paths = (job.image_path, job.last_image_path)
    first, last = shared(on_first(lambda: tuple(read_image(p) if p else None for p in paths)))
    assert video is not None  # the flag has a default
    request = VideoRequest(
        prompt=flags.prompt,
        recipe=job.recipe,
        size=frame_size(flags, first),
        num_frames=flags.num_frames,
        num_samples=flags.num_samples,
        seed=flags.seed,
        negative_prompt=job.negative_prompt,
        image=first,
        last_image=last,
    )
    _check_amount(request)
    task = Task(
        request.input_channels,
        images=0 if job.clip_path is None else 1 + (last is not None),
        clip_path=job.clip_path,
    )
    pipeline = open_pipeline(
        flags, job.networks, family=job.family, task=task, clock=clock, size=request.size
    )
    if not leads():
        _generate(flags, pipeline, request, progress=None)
        return
    if flags.random_weights:
        print(BANNER, flush=True)
    _, _, frames, height, width = request.latent_shape
    print(
        f"{flags.num_samples} x {flags.num_frames} frames of {request.size} (HxW),"
        f" {frames}x{height}x{width} latents, {frames * request.tokens_per_frame} tokens;"
        f" {len(job.recipe.times()) - 1} steps on {num_ranks()} x {clock.device}",
        flush=True,
    )
    with Progress(sys.stdout) as progress:
        clock.watch = progress.part
        made = _generate(flags, pipeline, request, progress=progress)
        with clock.part("write"):
            assert made.frames is not None  # this is rank 0
            about: dict[str, Any] = {"num_frames": flags.num_frames, "prompt": flags.prompt}
            with VideoWriter(video, preview, flags=flags, **about) as writer:
                writer.append(made.frames)
    for line in cost_lines(clock, made.steps):
        print(line, flush=True)
    print(f"wrote {flags.save_path}", flush=True)
    if report is not None:
        write_report(report, flags, request, made, clock=clock, networks=job.networks)


def frame_size(flags: argparse.Namespace, image: Tensor | None) -> FrameSize:
    """The size that the flags ask for; `ConfigError` lists what there is."""
    adaptive = getattr(flags, "adaptive_resolution", False)
    if flags.size is not None:
        if adaptive:
            raise ConfigError(
                "--size and --adaptive_resolution both set the size; give one of them"
            )
        return written_size(flags.size)
    size = table_size(flags.resolution, flags.aspect_ratio)
    if not adaptive:
        return size
    assert image is not None  # the flag needs one
    return adaptive_size(size, image=image_size(image))


def check_beside(size: FrameSize, *, count: int) -> None:
    """`ConfigError` where so many samples do not fit side by side into a file."""
    advice = "choose a smaller --size" if count == 1 else "lower --num_samples or --size"
    check_frame(size.height, size.width * count, scale=1, advice=advice)


def _check_amount(request: VideoRequest) -> None:
    size = request.size
    gib = request.num_samples * request.num_frames * size.height * size.width * 12 / 2**30
    if gib > MAX_PIXELS_GIB:
        raise ConfigError(
            f"{request.num_samples} x {request.num_frames} frames of {request.size} are {gib:.0f}"
            f" GiB of pixels, at most {MAX_PIXELS_GIB} are made at once; lower --num_samples,"
            " --num_frames or --size"
        )
    check_beside(size, count=request.num_samples)


def _generate(
    flags: argparse.Namespace,
    pipeline: WanPipeline,
    request: VideoRequest,
    *,
    progress: Progress | None,
) -> GeneratedVideo:
    for _ in range(flags.warmup_iters):
        pipeline.generate(request)
    if flags.warmup_iters:
        pipeline.clock.restart()
    return pipeline.generate(request, on_step=None if progress is None else progress.step)
