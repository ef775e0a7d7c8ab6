"""Does one rank's loader keep up with a training step, and what does a large data set cost to open?

    python -m scripts.bench_data --workers 0 1 2 4
    python -m scripts.bench_data --data 'data/wan14b_480p/shard-*.tar' --cold --batch 2
    python -m scripts.bench_data --index 10000000 --shards 10000

The first two fetch batches as training does (shuffled, checked, float32), one row per number of
reading threads, against the samples per second that a step takes. Without --data a set of random
samples of the true size is written and removed. The third writes the index of a set that is not
there (its shards are holes), and opens it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcm.core.errors import ConfigError
from rcm.data.latents import LatentShards, expand_pattern
from rcm.data.loader import Loader
from rcm.data.set_index import write_record
from rcm.data.shard_writer import ShardSample, shard_name, write_shard
from rcm.data.tar_index import ShardIndex
from rcm.inference.outcome import command
from rcm.train.monitor import resident_bytes
from scripts.bench_measure import bench_flags, in_words, machine, present_folder, write

MIB = 2**20
_SAMPLE = 8_427_520
"""Bytes of a 480p sample in a shard."""

_SETTLE = 2.1
"""Seconds after which a shard is believed by size and time."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; argparse ends the process with status 2 for a wrong one."""
    parser = bench_flags(__doc__)
    add = parser.add_argument
    add("--data", metavar="PATTERN", help="shards to read instead of random ones")
    add(
        "--folder",
        type=present_folder,
        help="where random shards or the index are written [temporary]",
    )
    add("--latents", type=sizes, default=(16, 21, 60, 104), metavar="CxTxHxW", help="[480p]")
    add("--text", type=sizes, default=(512, 4096), metavar="LxE", help="[512x4096]")
    add("--samples", type=int, default=64, help="random samples to write [%(default)s]")
    add("--workers", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N", help="threads")
    add("--prefetch_factor", type=int, default=2, help="batches ahead of each [%(default)s]")
    add("--batch", type=int, default=1, help="samples of a rank in a step [%(default)s]")
    add(
        "--step_seconds",
        type=float,
        default=3.26,
        help="seconds of a step [%(default)s, TF diffusion at 1.3B on one H200, docs/scale.md]",
    )
    add("--seconds", type=float, default=5.0, help="length of a row [%(default)s]")
    add("--cold", action="store_true", help="drop the shards from the page cache before a row")
    add("--index", type=int, metavar="SAMPLES", help="instead: open a set of so many samples")
    add("--shards", type=int, default=10_000, help="of --index [%(default)s]")
    drawn, read = ("folder", "latents", "text", "samples"), ("batch", "step_seconds", "seconds")
    read += ("workers", "prefetch_factor")
    # what is wrong with the set itself is said first
    parser.idle(*drawn, beside="data", when=lambda options: bool(glob(options.data or "")))
    parser.idle(
        *("data", "cold", *drawn[1:], *read),
        beside="index",
        when=lambda options: bool(options.index) and options.index % max(options.shards, 1) == 0,
    )
    parser.idle("shards", without="index")
    return parser.parse_args(argv)


def sizes(text: str) -> tuple[int, ...]:
    """Numbers of "16x21x60x104"."""
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not sizes joined by x, such as 512x4096")
    return tuple(int(part) for part in parts)


def random_shards(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Shards of 16 random samples in bfloat16."""
    stream = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=stream).bfloat16()  # noqa: E731
    paths = []
    for first in range(0, options.samples, 16):
        count = min(16, options.samples - first)
        path = folder / shard_name(len(paths))
        made = (ShardSample(draw(options.latents), draw(options.text), "") for _ in range(count))
        write_shard(path, made, first_key=first)
        paths.append(path)
    return paths


def forget(paths: Sequence[Path]) -> None:
    """Ask the system to drop the files from its page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_reset() -> None:
    """Let the system count the peak of resident memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak of resident memory since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def reading(options: argparse.Namespace, source: LatentShards, workers: int) -> dict[str, Any]:
    """One row: batches as fast as they come, for `--seconds` after the threads have begun."""
    paths = [shard.path for shard in source.shards]
    if options.cold:
        forget(paths)
    base = resident_bytes()
    peak_reset()
    loader = Loader(
        source,
        batch_size=options.batch,
        prefetch=options.prefetch_factor * workers,
        threads=max(1, workers),
    )
    next(loader)
    begun, processor, count = time.perf_counter(), time.process_time(), 0
    while (spent := time.perf_counter() - begun) < options.seconds or count < 3:
        next(loader)
        count += 1
    processor = time.process_time() - processor
    loader.close()
    samples = count * options.batch
    stored = sum(shard.size for shard in source.shards) / len(source)
    need = options.batch / options.step_seconds
    return {
        "workers": workers,
        "samples_per_second": samples / spent,
        "mb_per_second": samples / spent * stored / 1e6,
        "processor_ms_per_sample": 1e3 * processor / samples,
        "times_the_need": samples / spent / need,
        "memory_mib": (peak_bytes() - base) / MIB,
    }


def hollow_shards(folder: Path, *, samples: int, shards: int) -> Iterator[Any]:
    """Shards of 480p samples as an index knows them; their files are there."""
    per = samples // shards
    spans = np.zeros((per, 3, 2), np.int64)
    for field, (at, length) in enumerate(
        ((512, 4_194_000), (4_198_400, 4_195_900), (8_425_000, 99))
    ):
        spans[:, field, 0], spans[:, field, 1] = _SAMPLE * np.arange(per) + at, length
    for number in range(shards):
        path = folder / shard_name(number)
        keys = tuple(f"{key:09d}" for key in range(number * per, (number + 1) * per))
        yield os.stat(path), ShardIndex(path, per * _SAMPLE, keys, spans, f"{number:032x}")


def opening(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the index of `--index` samples, then open it as a rank does."""
    if not 1 <= options.shards <= options.index or options.index % options.shards:
        raise ConfigError(
            f"--index {options.index} samples cannot be spread evenly over --shards"
            f" {options.shards}; choose a divisor"
        )
    for number in range(options.shards):
        with open(folder / shard_name(number), "wb") as file:
            file.truncate(options.index // options.shards * _SAMPLE)
    time.sleep(_SETTLE)
    write_record(folder, hollow_shards(folder, samples=options.index, shards=options.shards))
    base = resident_bytes()
    peak_reset()
    rows: dict[str, Any] = {"samples": options.index, "shards": options.shards}

    def lap(name: str, work: Callable[[], Any]) -> Any:
        begun, processor = time.perf_counter(), time.process_time()
        made = work()
        rows[f"{name}_seconds"] = time.perf_counter() - begun
        rows[f"{name}_processor_seconds"] = time.process_time() - processor
        rows[f"{name}_mib"] = (resident_bytes() - base) / MIB
        return made

    def ordered() -> Loader:
        loader = Loader(source, batch_size=1, data_rank=2, data_world=7, prefetch=0)
        loader._plan((0, 0))
        return loader

    def find() -> None:
        for index in range(0, options.index, max(1, options.index // 1000)):
            shard, sample = source._locate(index)
            shard.key(sample), shard.span(sample, 0)

    source = lap("open", lambda: LatentShards(f"{folder}/shard-*.tar"))
    lap("fingerprint", source.fingerprint)
    loader = lap("order", ordered)
    lap("thousand_places", find)
    rows["peak_mib"] = (peak_bytes() - base) / MIB
    rows["index_bytes"] = (folder / "dataset.index").stat().st_size
    rows["position_bytes"] = len(str(loader.state_dict()))
    return rows


def measured(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of the run that the flags ask for, printed as they come."""
    if options.index is not None:
        rows = opening(options, folder)
        for name, value in rows.items():
            print(f"{name:32} {value:,.3f}" if isinstance(value, float) else f"{name:32} {value:,}")
        return [rows]
    paths = expand_pattern(options.data, knob="--data") if options.data else None
    source = LatentShards(paths or random_shards(options, folder))
    batch = source.fetch([0])
    print(f"{len(source)} samples {list(batch.latents.shape[1:])}, {list(batch.text.shape[1:])}")
    print(
        f"a step of {options.step_seconds:g} s takes {options.batch / options.step_seconds:.2f}"
        " samples/s"
    )
    head = f"{'workers':>7} {'samples/s':>10} {'MB/s':>7} {'CPU ms/sample':>14} {'x need':>7}"
    print(f"{head} {'MiB':>6}")
    rows = []
    for workers in options.workers:
        row = reading(options, source, workers)
        rows.append(row)
        print(
            f"{workers:7} {row['samples_per_second']:10.1f} {row['mb_per_second']:7.0f}"
            f" {row['processor_ms_per_sample']:14.1f} {row['times_the_need']:7.1f}"
            f" {row['memory_mib']:6.0f}"
        )
    return rows


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print."""
    options = arguments(argv)
    _check(options)
    here = machine("cpu")
    print(in_words(here))
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_data_") as folder:
        rows = measured(options, Path(folder))
    if options.json:
        write(options.json, {"machine": here, "options": vars(options), "rows": rows})


def _check(options: argparse.Namespace) -> None:
    if not sys.platform.startswith("linux"):
        raise ConfigError("memory and page cache are measured through /proc: run it on Linux")
    if len(options.latents) != 4 or len(options.text) != 2:
        raise ConfigError("--latents takes four sizes (16x21x60x104) and --text two (512x4096)")


if __name__ == "__main__":
    raise SystemExit(main())
