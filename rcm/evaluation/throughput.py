"""How fast a stream is: first chunk, later chunks, frames per second, peak CUDA memory."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rcm.pipelines.stream_spec import StreamedChunk, StreamReport


@dataclass(frozen=True)
class Throughput:
    """Means over `num_runs` runs, in seconds: until the first chunk's pixels, between later chunks,
    in all. Decoding is included; reading weights and encoding text are not. `peak_memory_gib` of a
    CUDA device (None elsewhere), weights included. `runs`: total seconds of each.
    """

    first_chunk: float
    later_chunks: float
    total: float
    fps: float
    num_frames: int
    num_runs: int
    peak_memory_gib: float | None
    runs: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    start: Callable[[], Iterable[StreamedChunk]],
    *,
    warmup: int = 1,
    num_runs: int = 3,
    device: torch.device | str = "cpu",
) -> Throughput:
    """`Throughput` of the stream that `start` begins: `warmup` untimed runs, `num_runs` timed ones.

    fps is frames over the mean total (docs/reference/sampling.md#timing).
    """
    on_cuda = torch.device(device).type == "cuda"
    for _ in range(warmup):
        _drain(start())
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    reports = [_drain(start()) for _ in range(num_runs)]
    totals = tuple(report.chunk_seconds[-1] for report in reports)
    return Throughput(
        first_chunk=fmean(report.first_chunk for report in reports),
        later_chunks=fmean(report.later_chunks for report in reports),
        total=fmean(totals),
        fps=reports[0].num_frames / max(fmean(totals), 1e-9),
        num_frames=reports[0].num_frames,
        num_runs=num_runs,
        peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30 if on_cuda else None,
        runs=totals,
    )


def _drain(chunks: Iterable[StreamedChunk]) -> StreamReport:
    """Run a stream to its end, keeping no pixels."""
    report = StreamReport()
    for chunk in chunks:
        report.add(chunk)
    return report


def processor() -> str:
    """The processor's model name, as the system knows it."""
    try:
        if platform.system() == "Linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            return next(
                line.partition(":")[2].strip()
                for line in lines
                if line.startswith(("model name", "Model"))
            )
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, StopIteration, subprocess.CalledProcessError):
        pass  # then the name that Python knows
    return platform.processor() or platform.machine()
