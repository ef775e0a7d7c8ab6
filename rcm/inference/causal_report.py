"""What a causal command tells of its time and memory, in the words and by the rules of the release,
and as JSON.

DiT sampling lasts from before the noise is drawn until the last chunk's context; a chunk's latency
from the end of the one before (the first's from the moment noise and cache are ready) until its own
context is in the cache. Neither contains decoding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from rcm.core.output_file import OutputFile
from rcm.inference.wan_report import common_record, peak_lines
from rcm.kernels.kv_codec.spec import KVCodecSpec
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.wan_sizes import FrameSize
from rcm.rollout.recipe import SamplingRecipe

if TYPE_CHECKING:
    from rcm.inference.causal_film import Film

Moment = Any
"""A point in time of a `Stopwatch`."""


class Stopwatch:
    """Points in time on a device: CUDA events, read when everything is done, or the host's
    clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Moment:
        """This point in time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # the current card may be another
        return event

    def ms(self, start: Moment, stop: Moment) -> float:
        """Milliseconds between two points, once the device reached the second."""
        if self.device.type != "cuda":
            return 1000 * (stop - start)
        stop.synchronize()
        return start.elapsed_time(stop)


@dataclass
class Marks:
    """The points in time of one run. `given` first chunks are an image's."""

    watch: Stopwatch
    given: int = 0
    points: dict[str, Moment] = field(default_factory=dict)
    chunks: list[Moment] = field(default_factory=list)
    decoded: list[tuple[Moment, Moment]] = field(default_factory=list)

    def mark(self, name: str) -> None:
        """Name this point: "begin", "ready" or "end"."""
        self.points[name] = self.watch.now()

    def chunk(self) -> None:
        """A chunk is done, context and all."""
        self.chunks.append(self.watch.now())

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """The pixels of the next chunk are made meanwhile."""
        start = self.watch.now()
        yield
        self.decoded.append((start, self.watch.now()))

    def run(self, *, streaming: bool) -> Run:
        """The run in milliseconds; `streaming`: chunks were decoded between the chunks."""
        ms, ready, first, second = self.watch.ms, self.points["ready"], self.given, self.given + 1
        spans = [ms(*span) for span in self.decoded]
        between = spans if streaming else []
        stops = [stop for _, stop in self.decoded] if streaming else []
        done = stops or self.chunks
        there = len(self.chunks)
        return Run(
            dit=ms(self.points["begin"], self.points["end"]) - sum(between),
            vae=sum(spans),
            first_chunk=(
                ms(ready, self.chunks[first]) - sum(between[:first]) if first < there else None
            ),
            second_chunk=ms(done[first], self.chunks[second]) if second < there else None,
            first_pixels=ms(ready, stops[first]) if first < len(stops) else None,
            second_pixels=ms(stops[first], stops[second]) if second < len(stops) else None,
        )


@dataclass(frozen=True)
class Run:
    """One timed run in milliseconds; None for a chunk that there is not, and for pixels where they
    were made at the end.
    """

    dit: float
    vae: float
    first_chunk: float | None
    second_chunk: float | None
    first_pixels: float | None = None
    second_pixels: float | None = None

    @property
    def total(self) -> float:
        """Sampling and decoding."""
        return self.dit + self.vae


@dataclass
class Timing:
    """The timed runs of one video."""

    num_frames: int
    runs: list[Run] = field(default_factory=list)
    cache_bytes: int = 0
    passes: dict[str, int] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """Mean of a figure over the runs; None where there is none."""
        found = [getattr(run, name) for run in self.runs]
        return None if None in found else fmean(found)

    @property
    def fps(self) -> float:
        """Pixel frames per second of the mean total."""
        return self.num_frames / max(fmean(run.total for run in self.runs) / 1000, 1e-9)


_LINES = (
    ("dit", "DiT sampling"),
    ("first_chunk", "First chunk latency (first-frame DiT latency)"),
    ("second_chunk", "Second chunk latency"),
    ("first_pixels", "First chunk, decoded"),
    ("second_pixels", "Second chunk, decoded"),
    ("vae", "VAE decoding"),
    ("total", "Total"),
)


def timing_lines(timing: Timing, clock: PartClock) -> list[str]:
    """The report of a video: a line per run where there are several, then the means, frames per
    second and memory.
    """
    lines = []
    if len(timing.runs) > 1:
        for number, run in enumerate(timing.runs, 1):
            told = (
                f"run {number}/{len(timing.runs)}: DiT {run.dit:.1f} ms, VAE {run.vae:.1f} ms,"
                f" Total {run.total:.1f} ms"
            )
            told += "".join(
                f", {name} {value:.1f} ms"
                for name, value in (
                    ("FirstChunk", run.first_chunk),
                    ("SecondChunk", run.second_chunk),
                )
                if value is not None
            )
            lines.append(told)
    for name, words in _LINES:
        if (value := timing.mean(name)) is not None:
            lines.append(f"{words}: {value:.1f} ms")
    lines.append(f"FPS: {timing.fps:.1f} ({timing.num_frames} frames)")
    lines.append(f"KV cache: {timing.cache_bytes / 2**30:.3f} GiB")
    return [*lines, *peak_lines(clock)]


def write_causal_report(
    path: OutputFile,
    flags: argparse.Namespace,
    recipe: SamplingRecipe,
    codec: KVCodecSpec | None,
    films: Sequence[Film],
    timings: Sequence[Timing],
    *,
    size: FrameSize,
    clock: PartClock,
) -> None:
    """Everything needed to make the videos again, and what they cost; written whole or not at
    all.
    """
    record = common_record(flags, clock) | {
        "recipe": asdict(recipe),
        "kv_codec": None if codec is None else asdict(codec),
        "size": {"height": size.height, "width": size.width},
        "videos": [
            _video(film, timing, recipe) for film, timing in zip(films, timings, strict=True)
        ],
    }
    path.write(json.dumps(record, indent=2, default=str))


def _video(film: Film, timing: Timing, recipe: SamplingRecipe) -> dict[str, Any]:
    starts = film.timeline.first_blocks(recipe.blocks) if film.timeline.is_timed else (0,)
    segments = [
        asdict(segment) | {"first_block": start}
        for segment, start in zip(film.timeline.segments, starts, strict=True)
    ]
    means = {f"{name}_ms": timing.mean(name) for name, _ in _LINES}
    return {
        "path": film.target.given,
        "segments": segments,
        "latent_frames": film.latent_frames,
        "num_frames": timing.num_frames,
        **means,
        "fps": timing.fps,
        "runs": [asdict(run) for run in timing.runs],
        "cache_bytes": timing.cache_bytes,
        "passes": timing.passes,
    }
