"""Long streams under every extrapolation method, 1.3B with random weights and the whole VAE: is
time flat, is memory?

    python -m scripts.bench_policies --minutes 5 --size 240x416 --out policies.json
    python -m scripts.bench_policies --methods rolling_sink,memrope --minutes 5 --out policies.json

Chunks of three frames, steps [4,2]; each method with its command's defaults. Times are wall-clock
per chunk, from step to step, pixels in host memory; a chunk is 12 frames, 0.75 s of video. "first"
is the first tenth after the cache is full.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rcm.encoders.wan_vae import WanVAECodec
from rcm.inference.causal_methods import METHODS, policy_of
from rcm.inference.outcome import command
from rcm.nets.denoiser import Denoiser
from rcm.pipelines.session import Session
from rcm.pipelines.wan_sizes import written_size
from rcm.rollout.eviction.base import CachePolicy
from scripts.bench_measure import (
    GIB,
    attempted,
    bench_flags,
    chosen_parts,
    forget,
    in_words,
    quantile,
    this_card,
    write,
)
from scripts.bench_stream_runs import RECIPES, build, engine, prompt

CHUNKS_PER_MINUTE = 80
FULL = 40
"""Chunks until every method's cache is full: the largest keeps 26 frames, a pool of 8 blocks and
what they were chosen from.
"""
BOUNDED = [name for name in METHODS if name != "none"]


def policy(name: str) -> CachePolicy:
    """The method with the defaults of the command."""
    flags = argparse.Namespace(extrapolation_method=name, ntk_t=1.0, **METHODS[name].flags)
    return policy_of(flags, cuts=frozenset(), reduce=None)


def long_stream(
    denoiser: Denoiser, codec: WanVAECodec, name: str, *, chunks: int, size: tuple[int, int]
) -> dict[str, Any]:
    """Time per chunk and memory over `chunks` chunks."""
    spec = replace(
        engine(RECIPES["c3-3 [4,2]"], policy=policy(name)), latent=(16, size[0] // 8, size[1] // 8)
    )
    times, memory = [], []
    with Session(denoiser, codec, prompt(denoiser), spec, device="cuda") as session:
        before = time.perf_counter()
        for _ in range(chunks):
            session.step()
            now = time.perf_counter()
            times.append(now - before)
            before = now
            memory.append(torch.cuda.memory_allocated())
        passes = getattr(session.loop, "counts", None)
    kept, tenth = times[FULL:], max(1, (chunks - FULL) // 10)
    first, last = statistics.median(kept[:tenth]), statistics.median(kept[-tenth:])
    return {
        "chunks": chunks,
        "chunk_ms": 1e3 * statistics.median(kept),
        "p99_ms": 1e3 * quantile(kept, 0.99),
        "last_over_first": last / first,
        "memory_gib": memory[-1] / GIB,
        "memory_growth": (
            statistics.median(memory[-tenth:]) / statistics.median(memory[FULL : FULL + tenth]) - 1
        ),
        "passes": passes,
    }


@command
def main(argv: list[str] | None = None) -> int:
    """Run the methods one after the other and print a line each."""
    parser = bench_flags(__doc__, file="--out")
    parser.add_argument("--methods", default=",".join(BOUNDED), help="comma-separated")
    parser.add_argument("--minutes", type=float, default=5.0, help="of video")
    parser.add_argument("--size", default="480x832", metavar="HxW", help="pixels")
    options = parser.parse_args(argv)
    names = chosen_parts(options.methods, BOUNDED, flag="--methods")
    size = written_size(options.size)
    report: dict[str, Any] = this_card("bench_policies") | {"size": options.size, "rows": {}}
    chunks = max(FULL + 10, round(options.minutes * CHUNKS_PER_MINUTE))
    denoiser, codec = build("1.3B"), WanVAECodec.random(device="cuda")
    for name in names:
        forget()
        stream = partial(long_stream, denoiser, codec, name, chunks=chunks, size=size)
        report["rows"][name] = found = attempted(stream)
        print(name, in_words(found), flush=True)
        if options.out:
            write(options.out, report)
    return 1 if any("error" in row for row in report["rows"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
