"""What a Wan command tells of its work: seconds and peak memory per part, a JSON report."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from rcm.core.output_file import OutputFile
from rcm.inference.wan_flags import NetworkFile
from rcm.pipelines.experts import Step
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.wan_pipeline import GeneratedVideo, VideoRequest
from rcm.pipelines.wan_ranks import num_ranks
from rcm.train.describe import installed_versions

BANNER = "\n".join(
    (
        "#" * 100,
        *(
            f"#  {line:<96}#"
            for line in (
                "RANDOM WEIGHTS: networks, VAE and text encoder are random numbers, "
                "no file is read.",
                "The video means nothing. Only times and memory do.",
            )
        ),
        "#" * 100,
    )
)
WATERMARK = "RANDOM WEIGHTS: the video means nothing, only times and memory do"


def cost_lines(clock: PartClock, steps: Sequence[Step]) -> list[str]:
    """Seconds of every part, of a step, and peak memory, in words."""
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in clock.seconds.items())
    forward = [step.seconds for step in steps]
    return [
        f"seconds: {parts}; total {clock.total:.2f} s",
        (
            f"network: {len(forward)} steps, {sum(forward) / len(forward):.3f} s each (first"
            f" {forward[0]:.3f}, last {forward[-1]:.3f})"
        ),
        *peak_lines(clock),
    ]


def write_report(
    target: OutputFile,
    flags: argparse.Namespace,
    request: VideoRequest,
    made: GeneratedVideo,
    *,
    clock: PartClock,
    networks: Sequence[NetworkFile],
) -> None:
    """Everything needed to make the video again, and what it cost, as JSON; written whole or not at
    all.
    """
    record = common_record(flags, clock) | {
        "networks": [asdict(network) for network in networks],
        "size": {
            "height": request.size.height,
            "width": request.size.width,
            "num_frames": request.num_frames,
        },
        "latent_shape": list(request.latent_shape),
        "tokens": request.latent_shape[2] * request.tokens_per_frame,
        "recipe": asdict(request.recipe),
        "times": list(request.recipe.times()),
        "steps": [asdict(step) for step in made.steps],
        "seconds_per_step": sum(step.seconds for step in made.steps) / len(made.steps),
    }
    target.write(json.dumps(record, indent=2, default=str))


def common_record(flags: argparse.Namespace, clock: PartClock) -> dict[str, Any]:
    """What the report of every Wan command says: what was asked for, of which machine, at what
    cost.
    """
    peaks = {name: _gib(size) for name, size in clock.peak_bytes.items()}
    on_cuda = clock.device.type == "cuda"
    return {
        "random_weights": flags.random_weights,
        **({"watermark": WATERMARK} if flags.random_weights else {}),
        "flags": {name: value for name, value in vars(flags).items() if name != "report"},
        "seconds": {**clock.seconds, "total": clock.total},
        "peak_memory_gib": None if clock.peak is None else {**peaks, "all": _gib(clock.peak)},
        "device": torch.cuda.get_device_name(clock.device) if on_cuda else "cpu",
        "ranks": num_ranks(),
        "versions": installed_versions(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def peak_lines(clock: PartClock) -> list[str]:
    """Peak memory of the device, as a line; none where it does not count."""
    if clock.peak is None:
        return []
    peaks = ", ".join(f"{name} {_gib(size):.2f}" for name, size in clock.peak_bytes.items())
    return [f"peak GPU memory: {_gib(clock.peak):.2f} GiB ({peaks})"]


def _gib(size: int) -> float:
    return size / 2**30
