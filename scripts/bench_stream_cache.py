"""Streams over quantised caches, random weights at full size: memory that the cache takes, time per chunk, error of the latents.

    python -m scripts.bench_stream_cache --out cache.json

1.3B, 480x832, chunks of three frames, steps [4,2], a window of 21 frames in its steady state, decoder left out. Memory is what the cache
holds after a chunk (codes, plain newest chunk, scratch). Errors are of the latents after `--chunks` chunks against bf16 on the same noise;
with random weights they say little of pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from rcm.pipelines.session import Session
from rcm.rollout.eviction.sliding_window import SlidingWindow
from scripts.bench_measure import GIB, write
from scripts.bench_stream import RECIPES, build, engine, prompt

ROWS: dict[str, dict[str, Any]] = {
    "bf16, captured": {"graphs": "on"},
    "bf16, eager": {"graphs": "off"},
    "fp8": {"dtype": "fp8"},
    "int4": {"dtype": "int4"},
    "int2": {"dtype": "int2"},
    "int2 qvg": {"dtype": "int2", "smoothing": "qvg"},
    "int2 qvg, 2 iterations": {"dtype": "int2", "smoothing": "qvg", "qvg_iters": 2},
    "int2 qvg, newest chunk plain": {"dtype": "int2", "smoothing": "qvg", "hot_chunks": 1},
}


def row(denoiser: Any, settings: dict[str, Any], *, chunks: int) -> dict[str, Any]:
    """Time, memory and latents of one kind of cache."""
    given = {"look_ahead": False, "first_alone": False, "to_host": False, "policy": SlidingWindow(7)}
    if "dtype" in settings:
        side = SideSpec(dtype=settings["dtype"], smoothing=settings.get("smoothing", "none"))
        codec = KVCodec(KVCodecSpec(key=side, value=side, qvg_iters=settings.get("qvg_iters", 4)))
        given |= {"graphs": "off", "kv_codec": codec, "hot_chunks": settings.get("hot_chunks", 0)}
    else:
        given |= settings
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    with Session(denoiser, None, prompt(denoiser), engine(RECIPES["c3-3 [4,2]"], **given), device="cuda") as session:
        latents = torch.cat([session.step().latents for _ in range(8)], dim=2)
        for _ in range(chunks):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            session.step()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        held = session.loop.cache.num_bytes()
        allocated = torch.cuda.memory_allocated() - before
    return {
        "chunk_ms": statistics.median(times),
        "cache_gib": held / GIB,
        "allocated_gib": allocated / GIB,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "latents": latents,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the rows, compare them with the first two, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=5)
    parser.add_argument("--out", default="stream_cache.json")
    options = parser.parse_args(argv)
    denoiser, report = build("1.3B"), {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    plain: dict[str, Any] = {}
    for name, settings in ROWS.items():
        torch.cuda.empty_cache()
        found = row(denoiser, settings, chunks=options.chunks)
        latents = found.pop("latents")
        plain = plain or {**found, "latents": latents}
        found["latents_error"] = float((latents - plain["latents"]).norm() / plain["latents"].norm())
        found["memory_over_bf16"] = plain["cache_gib"] / found["cache_gib"]
        found["time_over_captured"] = found["chunk_ms"] / plain["chunk_ms"]
        found["time_over_eager"] = found["chunk_ms"] / report.get("bf16, eager", found)["chunk_ms"]
        report[name] = found
        print(name, json.dumps({k: round(v, 4) for k, v in found.items()}), flush=True)
        write(options.out, report)


if __name__ == "__main__":
    main()
