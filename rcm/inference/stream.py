"""Stream a video from a checkpoint: chunks are decoded and written as they arrive.

    rcm stream  # the shipped checkpoint of the toy world
    rcm stream --prompt "a green cross moving up" --num_frames 65
    rcm stream --ckpt outputs/rcm/toy/toy_tf_c3-3 --prompt "a red square moving left" --num_steps 20

Network, codec, pattern and steps come from the checkpoint; flags change the sampling where the
checkpoint supports it. Errors that you can fix are one sentence, with exit status 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.core.text_file import read_lines
from rcm.data.prompts import require_lines
from rcm.encoders.prompt_cleaning import checked_prompts
from rcm.evaluation.throughput import Throughput, measure
from rcm.inference.checkpoint_flags import HERE, KINDS, open_flagged
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import check_device, exit_status, sparing
from rcm.inference.stream_recipe import add_recipe_flags, chosen_recipe
from rcm.pipelines.first_block import first_latents, is_image
from rcm.pipelines.from_checkpoint import LoadedModel
from rcm.pipelines.stream_spec import StreamedChunk, StreamReport
from rcm.pipelines.video_io import (
    COMFORTABLE,
    Mp4Writer,
    check_frame,
    claim_video,
    comfortable_scale,
)
from rcm.rollout.recipe import SamplingRecipe
from rcm.storage.shipped import TOY_PROMPTS, asset
from rcm.train.describe import installed_versions

SHOWN = 4
"""Prompts of the shipped list that are streamed side by side when none is given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rcm stream` and `rcm-stream`; returns the exit status."""
    with warnings.catch_warnings():
        # one process is what this is meant for
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return exit_status(lambda: run(_parser().parse_args(argv)))


def run(flags: argparse.Namespace) -> None:
    """Check the flags, open the checkpoint, time it if asked, then stream into the file."""
    shipped = flags.ckpt is None
    if shipped and flags.prompt is None and flags.prompt_file is None:
        prompts = read_prompts(None, str(asset(TOY_PROMPTS)), allow_empty=False)[:SHOWN]
    else:
        prompts = read_prompts(
            flags.prompt, flags.prompt_file, allow_empty=flags.allow_empty_prompt
        )
    _check_flags(flags)
    save_to = claim_video(flags.save_path, knob="--save_path")
    sparing(save_to, flags, knob="--save_path")
    report_to = None
    if flags.report is not None:
        report_to = OutputFile.claim(flags.report, suffix=".json", knob="--report")
        sparing(report_to, flags, knob="--report")
    model = open_flagged(flags)
    recipe = chosen_recipe(flags, model.trained_recipe)
    upscale = flags.upscale or comfortable_scale(*model.pixel_size)
    height, width = model.pixel_size
    beside = f"give fewer than {len(prompts)} prompts, which are written side by side"
    advice = beside if upscale == 1 else f"lower --upscale {upscale}, or {beside}"
    check_frame(height, width * len(prompts), scale=upscale, pad=True, advice=advice)
    prefix = _prefix(flags, model, recipe)

    def start() -> Iterator[StreamedChunk]:
        return model.stream(
            prompts,
            recipe=recipe,
            seed=flags.seed,
            num_frames=flags.num_frames,
            prefix=prefix,
            ignore_recipe=flags.ignore_recipe,
        )

    stream = start()
    about = (
        f"{model.description.stage}, iteration {model.description.iteration}, {flags.weights}"
        " weights"
    )
    print(f"{model.source}: {about}; {_told(recipe)}", flush=True)
    if flags.prompt is None and flags.prompt_file is None:
        print(f"prompts, side by side: {'; '.join(prompts)}", flush=True)
    timing = _timed(flags, start, device=model.device)
    fps = flags.fps or model.fps
    report = _write(stream, save_to, fps=fps, upscale=upscale)
    if report_to is not None:
        report_to.write(
            json.dumps(_record(flags, model, recipe, prompts, report, timing), indent=2)
        )
    if shipped:
        print(f"next: {next_command(flags)}", flush=True)


def next_command(flags: argparse.Namespace) -> str:
    """What to try after a first look at the shipped checkpoint."""
    if flags.prompt is None and flags.prompt_file is None:
        return (
            'rcm stream --prompt "a blue triangle moving down" --num_frames 65 --save_path'
            " outputs/long.mp4"
        )
    return (
        "rcm demo   # trains every stage behind this checkpoint, and scores them (rcm demo --help)"
    )


def read_prompts(given: Sequence[str] | None, file: str | None, *, allow_empty: bool) -> list[str]:
    """Prompts of the command line, then the lines of a file. `ConfigError` without any, or for an
    empty one that is not allowed by name.
    """
    named = [(f"--prompt number {i}", text) for i, text in enumerate(given or (), 1)]
    if file is not None:
        require_lines(file)
        lines = read_lines(file, what="prompt file", knob="--prompt_file")
        named += [(f"line {i} of {file}", text) for i, text in enumerate(lines, 1)]
    if not named:
        raise ConfigError(
            "no prompt; give --prompt TEXT (repeatable) or --prompt_file FILE with one prompt per"
            " line"
        )
    return checked_prompts(named, allow_empty=allow_empty)


_WHAT = """
ckpt                job folder, iter_* folder, or exported .pt/.pth/.safetensors
  [the shipped toy checkpoint]
prompt TEXT         what to show; repeatable: several videos side by side
  [of the shipped checkpoint: four examples]
prompt_file FILE    one prompt per line
allow_empty_prompt  sample an empty prompt, the unconditional one
num_frames N        pixel frames, given first frames included [as trained]
seed = 0            of the noise [%(default)s]
first_frames FILE   a video whose beginning, or an image, to continue
first_latents N     latent frames taken from it [the first block of the pattern; 1 of an image]
"""
_WRITTEN = f"""
save_path FILE.mp4 = outputs/stream.mp4  [%(default)s]
upscale N         write every pixel as N x N [toy videos: {COMFORTABLE} pixels or more; others: 1]
fps               frames per second of the file [as trained]
report FILE.json  settings and timings as JSON
"""
_MACHINE = """
weights = ema      averaged or last weights [%(default)s]
device             cpu or cuda [%(default)s]
precision          of the network [that of the training run]
vae_path           Wan2.1_VAE.pth, for a checkpoint trained on its latents
  [where the checkpoint says]
text_encoder_path  umT5, for a checkpoint trained on its embeddings [where the checkpoint says]
tokenizer_path     folder of umT5's tokenizer [beside the text encoder]
text_cache         folder that keeps umT5's embeddings for later runs
"""
_TIMING = """
warmup_iters int = 0  untimed runs before the timed ones [%(default)s]
num_runs int = 1      timed runs; with more than 1, or with a warm-up, timing runs write nothing
  [%(default)s]
"""


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="rcm stream", allow_abbrev=False, description=__doc__)
    group = parser.add_argument_group
    add_flags(group("what to stream"), _WHAT, KINDS, prompt={"action": "append"})
    add_flags(group("what to write"), _WRITTEN, KINDS)
    add_recipe_flags(parser)
    add_flags(group("weights and machine"), _MACHINE, KINDS, device=HERE)
    add_flags(group("timing"), _TIMING)
    return parser


def _check_flags(flags: argparse.Namespace) -> None:
    if flags.first_latents is not None and flags.first_frames is None:
        raise ConfigError(
            "--first_latents says how much of a file to take; give --first_frames FILE with it"
        )
    check_device(flags.device)


def _prefix(flags: argparse.Namespace, model: LoadedModel, recipe: Any) -> torch.Tensor | None:
    if flags.first_frames is None:
        return None
    if not isinstance(recipe, SamplingRecipe):
        stage = model.description.stage
        raise ConfigError(
            f"--first_frames needs a causal checkpoint; {model.source} (stage {stage}) samples"
            " whole videos"
        )
    count = flags.first_latents
    if count is None:
        count = 1 if is_image(flags.first_frames) else recipe.blocks.first
    height, width = model.pixel_size
    return first_latents(
        flags.first_frames,
        codec=model.codec,
        num_latents=count,
        height=height,
        width=width,
        device=model.device,
    )


def _timed(
    flags: argparse.Namespace, start: Callable[[], Iterator[StreamedChunk]], *, device: torch.device
) -> Throughput | None:
    if flags.warmup_iters == 0 and flags.num_runs == 1:
        return None
    timing = measure(start, warmup=flags.warmup_iters, num_runs=flags.num_runs, device=device)
    memory = (
        "" if timing.peak_memory_gib is None else f", peak memory {timing.peak_memory_gib:.2f} GiB"
    )
    print(
        f"timing over {timing.num_runs} runs after {flags.warmup_iters}: first chunk"
        f" {timing.first_chunk:.3f} s, later chunks {timing.later_chunks:.3f} s,"
        f" {timing.num_frames} frames in {timing.total:.3f} s, {timing.fps:.1f} fps{memory}",
        flush=True,
    )
    return timing


def _write(
    stream: Iterator[StreamedChunk], path: OutputFile, *, fps: float, upscale: int
) -> StreamReport:
    """Write chunks as they arrive, videos of a batch side by side, and print each latency; the time
    of writing is taken out.
    """
    report, writing, previous = StreamReport(), 0.0, 0.0
    with Mp4Writer(path, fps=fps, scale=upscale, pad=True) as writer:
        for arrived in stream:
            chunk = replace(arrived, seconds=arrived.seconds - writing)
            report.add(chunk)
            begin = time.perf_counter()
            writer.append(torch.cat(list(chunk.frames), dim=-1))
            frames, spent = chunk.frames.shape[2], chunk.seconds - previous
            previous = chunk.seconds
            writing += time.perf_counter() - begin
            print(
                f"chunk {chunk.block}: {frames} frames, {spent:.3f} s,"
                f" {frames / max(spent, 1e-9):.1f} fps",
                flush=True,
            )
    later = f", later chunks every {report.later_chunks:.3f} s"
    print(
        f"{path.given}: {report.num_frames} frames in {report.chunk_seconds[-1]:.3f} s"
        f" ({report.fps:.1f} fps), first chunk after {report.first_chunk:.3f} s"
        f"{later if len(report.chunk_seconds) > 1 else ''}",
        flush=True,
    )
    return report


def _told(recipe: Any) -> str:
    if not isinstance(recipe, SamplingRecipe):
        return (
            f"whole video, {recipe.kind}, {recipe.steps} steps, sigma_max {recipe.sigma_max:g},"
            f" guidance {recipe.guidance:g}"
        )
    if recipe.kind == "ode":
        return (
            f"pattern {recipe.pattern}, {recipe.ode_steps} ODE steps per chunk, shift"
            f" {recipe.shift:g}, guidance {recipe.guidance:g}"
        )
    steps = " ".join(str(len(entry) + 1) for entry in recipe.mids)
    times = "; ".join(", ".join(f"{t:.4g}" for t in entry) or "none" for entry in recipe.mids)
    context = (
        f"noisy context from chunk {recipe.noisy_context_start_chunk}"
        if recipe.noisy_context
        else "clean context"
    )
    seen = (
        ""
        if recipe.window is None
        else f", a window of {recipe.window} blocks beside {recipe.sinks} sinks"
    )
    return f"pattern {recipe.pattern}, steps per chunk {steps} (mid times {times}), {context}{seen}"


def _record(
    flags: argparse.Namespace,
    model: LoadedModel,
    recipe: Any,
    prompts: list[str],
    report: StreamReport,
    timing: Throughput | None,
) -> dict[str, Any]:
    description = model.description
    return {
        "checkpoint": {
            "path": str(model.source),
            "weights": flags.weights,
            "stage": description.stage,
            "iteration": description.iteration,
        },
        "recipe": asdict(recipe),
        "prompts": prompts,
        "seed": flags.seed,
        "num_frames": report.num_frames,
        "first_frames": flags.first_frames,
        "video": str(flags.save_path),
        "device": str(model.device),
        "chunk_seconds": report.chunk_seconds,
        "first_chunk_seconds": report.first_chunk,
        "later_chunk_seconds": report.later_chunks,
        "fps": report.fps,
        "timing": None if timing is None else timing.to_dict(),
        "versions": installed_versions(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


if __name__ == "__main__":
    sys.exit(main())
