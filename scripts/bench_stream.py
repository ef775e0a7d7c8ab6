"""Speed of streams at full size with random weights: correctness first, then latencies, gaps,
memory, idle share.

    python -m scripts.bench_stream --out stream.json                 # every part, one GPU
    python -m scripts.bench_stream --parts correct,c33,c11,steady

Times are wall-clock, from the call to pixels in host memory (uint8, pinned), the text already
encoded; medians of several videos after one that compiles and captures. Floors are the products and
attention calls of the passes and the decoder's convolutions, each timed alone.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
import traceback
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton

from rcm.core.arguments import Arguments
from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.encoders.wan_vae import WanVAECodec
from rcm.inference.outcome import command, writable_file
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.wan.config import PRESETS
from rcm.nets.wan.fp8 import noise_velocity, quantise_linears_
from rcm.nets.wan.model import WanDiT
from rcm.parallel.init import materialise, on_meta
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from scripts.bench_measure import GIB, breakdown, write
from scripts.bench_stream_host import host_time, timing, variant
from scripts.bench_stream_kernels import attention_in_parts, own_attention
from scripts.bench_train_step import fill

LATENT = (16, 60, 104)
FRAMES = 21
FOUR = (15 / 16, 5 / 6, 5 / 8)
RECIPES = {
    "c3-3 [4,2]": SamplingRecipe("few_step", "c3-3", mids=(FOUR, (5 / 6,))),
    "c3-3 [4,2] noisy": SamplingRecipe(
        "few_step", "c3-3", mids=(FOUR, (5 / 8,)), noisy_context=True, noisy_context_start_chunk=1
    ),
    "c3-3 [4]": SamplingRecipe("few_step", "c3-3", mids=(FOUR,)),
    "c1-1 [4,1]": SamplingRecipe("few_step", "c1-1", mids=(FOUR, ())),
    "c1-1 [4,2] noisy": SamplingRecipe(
        "few_step", "c1-1", mids=(FOUR, (5 / 8,)), noisy_context=True, noisy_context_start_chunk=1
    ),
    "c1-1 [4,1] noisy": SamplingRecipe(
        "few_step", "c1-1", mids=(FOUR, ()), noisy_context=True, noisy_context_start_chunk=1
    ),
}


def build(size: str, *, fused: str = "on") -> Denoiser:
    """A network of the published size with random weights in bfloat16."""
    config = PRESETS[size]
    net = on_meta(lambda: WanDiT(config, fused=fused)).requires_grad_(False).to(torch.bfloat16)
    fill(materialise(net, device="cuda"))
    return Denoiser(net, Precision.preset("bf16")).eval_params()


def prompt(denoiser: Denoiser, *, seed: int = 0) -> Condition:
    """A random prompt with its cross-attention keys."""
    config = denoiser.net.config
    text = torch.randn(
        1,
        config.text_len,
        config.text_dim,
        generator=torch.Generator("cuda").manual_seed(seed),
        device="cuda",
    )
    return denoiser.prepare(Condition(text))


CHOSEN: dict[str, Any] = {}
"""What the command line says of every stream."""


def engine(recipe: SamplingRecipe, **options: Any) -> StreamSpec:
    """A stream as fast as it goes."""
    given = (
        {
            "graphs": "on",
            "look_ahead": True,
            "first_alone": True,
            "to_host": True,
            "draw_on": "cuda",
        }
        | CHOSEN
        | options
    )
    return StreamSpec(recipe, LATENT, **given)


def watch(session: Session, *, most: int | None = None) -> dict[str, Any]:
    """Arrival of the pieces of a video, from the moment at which it begins."""
    stamps, frames = [], []
    while (chunk := session.step()) is not None:
        if session.spec.to_host and chunk.images is None:
            torch.cuda.synchronize()
        stamps.append(chunk.seconds)
        frames.append(chunk.frames.shape[2])
        if most and len(stamps) == most:
            break
    return {"first": stamps[0], "stamps": stamps, "frames": frames, "fps": sum(frames) / stamps[-1]}


def video(
    denoiser: Denoiser, codec: WanVAECodec | None, spec: StreamSpec, *, repeats: int = 3
) -> dict[str, Any]:
    """Medians over `repeats` videos of one session, after one that compiles and captures."""
    cond = prompt(denoiser)
    torch.cuda.reset_peak_memory_stats()
    with Session(denoiser, codec, cond, spec, device="cuda") as session:
        begin = time.perf_counter()
        watch(session)
        cold, runs = time.perf_counter() - begin, []
        for _ in range(repeats):
            torch.cuda.synchronize()
            session.restart()
            runs.append(watch(session))
        gaps = [
            b - a
            for run in runs
            for a, b in zip(run["stamps"][1:-1], run["stamps"][2:], strict=True)
        ]
        chunk = sum(
            run["stamps"][1 if spec.first_alone and spec.recipe.blocks.first > 1 else 0]
            for run in runs
        ) / len(runs)
        counts = getattr(session.loop, "counts", None)
    return {
        "fps": statistics.median(run["fps"] for run in runs),
        "total_s": statistics.median(run["stamps"][-1] for run in runs),
        "first_visible_s": statistics.median(run["first"] for run in runs),
        "first_chunk_s": chunk,
        "gap_p50_ms": 1e3 * statistics.median(gaps),
        "gap_p95_ms": 1e3 * quantile(gaps, 0.95),
        "gap_p99_ms": 1e3 * quantile(gaps, 0.99),
        "cold_video_s": cold,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "passes": counts,
    }


def quantile(values: list[float], q: float) -> float:
    """The value below which a share q of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def correct(denoiser: Denoiser, codec: WanVAECodec) -> dict[str, Any]:
    """Captured against eager on the same noise: latents of two windows' length, bf16; prompt
    changes and window wrap included.
    """
    plain = build("1.3B", fused="off")
    plain.net.load_state_dict(denoiser.net.state_dict())
    found = {}
    for name, frames in (("c3-3 [4,2]", 15), ("c1-1 [4,1]", 7), ("c1-1 [4,2] noisy", 7)):
        recipe, out = RECIPES[name], {}
        for kind, net, graphs in (
            ("eager plain", plain, "off"),
            ("eager fused", denoiser, "off"),
            ("captured", denoiser, "on"),
        ):
            policy = SlidingWindow(3, 1)
            spec = StreamSpec(
                recipe, LATENT, num_frames=frames, graphs=graphs, policy=policy, draw_on="cuda"
            )
            with Session(net, None, prompt(net), spec, device="cuda") as session:
                parts = []
                while (chunk := session.step()) is not None:
                    parts.append(chunk.latents)
                    if len(parts) == 3:
                        session.set_condition(prompt(net, seed=1))
            out[kind] = torch.cat(parts, dim=2)
        scale = out["eager plain"].square().mean().sqrt()
        found[name] = {
            k: float((out[k] - out["eager plain"]).square().mean().sqrt() / scale)
            for k in ("eager fused", "captured")
        }
        found[name]["captured against eager fused, largest"] = float(
            (out["captured"] - out["eager fused"]).abs().max()
        )
    return found


def steady(
    denoiser: Denoiser,
    codec: WanVAECodec | None,
    recipe: SamplingRecipe,
    *,
    chunks: int,
    window: int = 7,
    sinks: int = 0,
    idle: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """A stream without end in its steady state: time per chunk, drift of time and memory, GPU idle
    share.
    """
    spec = engine(recipe, policy=SlidingWindow(window, sinks), **options)
    with Session(denoiser, codec, prompt(denoiser), spec, device="cuda") as session:
        for _ in range(window + sinks + 6):
            session.step()
        torch.cuda.synchronize()
        session.step()  # the first step after a pause finds nothing under way
        stamps, memory = [], []
        begin = time.perf_counter()
        for _ in range(chunks):
            session.step()
            if codec is None:
                torch.cuda.synchronize()
            stamps.append(time.perf_counter() - begin)
            memory.append(torch.cuda.memory_allocated())
        block = session.next_block
        issues: dict[str, list[float]] = defaultdict(list)
        # before any profiler, which slows launches down for the rest of the process
        with timing(session, issues):
            for _ in range(5):
                session.step()
        share = idle_share(session) if idle else None
        torch.cuda.synchronize()
    times = [b - a for a, b in zip([0.0, *stamps[:-1]], stamps, strict=True)]
    tenth = max(1, len(times) // 10)
    return {
        "chunk_ms": 1e3 * statistics.median(times),
        "p95_ms": 1e3 * quantile(times, 0.95),
        "p99_ms": 1e3 * quantile(times, 0.99),
        "chunks": chunks,
        "last_over_first_tenth": (
            statistics.median(times[-tenth:]) / statistics.median(times[:tenth])
        ),
        "memory_growth": memory[-1] / memory[0] - 1,
        "memory_gib": memory[-1] / GIB,
        "host_issue_ms": statistics.median(issues["produce (issue of a chunk)"]),
        "idle_share": share,
        "last_block": block,
    }


def fp8(size: str, codec: WanVAECodec, which: str) -> dict[str, Any]:
    """Videos with FP8 linears, and the error of the velocity that they cost."""
    quantised = build(size)
    report = quantise_linears_(
        quantised.net,
        which=which,
        velocity=noise_velocity(quantised.net, size=LATENT[1:], frames=3),
    )
    found: dict[str, Any] = {"velocity_error": report.error, "replaced": len(report.replaced)}
    for name in ("c3-3 [4,2]", "c1-1 [4,1]"):
        found[name] = video(quantised, codec, engine(RECIPES[name], num_frames=FRAMES))
    found["steady c3-3 [4]"] = steady(quantised, codec, RECIPES["c3-3 [4]"], chunks=8)
    return found


def host(denoiser: Denoiser, codec: WanVAECodec | None, name: str, window: int) -> dict[str, Any]:
    """`host_time` of a stream whose window is full."""
    with Session(
        denoiser,
        codec,
        prompt(denoiser),
        engine(RECIPES[name], policy=SlidingWindow(window)),
        device="cuda",
    ) as session:
        for _ in range(window + 6):
            session.step()
        return host_time(session)


def compared(
    denoiser: Denoiser, codec: WanVAECodec, name: str, window: int, joined: bool, priority: int
) -> dict[str, Any]:
    """`steady` in one of its variants, see `variant`."""
    with variant(denoiser.net, joined=joined, priority=priority):
        return steady(denoiser, codec, RECIPES[name], chunks=10, window=window, idle=window > 7)


def profile_steady(
    denoiser: Denoiser, codec: WanVAECodec, name: str, window: int
) -> dict[str, Any]:
    """GPU time of four steady steps by kind of kernel."""
    with Session(
        denoiser,
        codec,
        prompt(denoiser),
        engine(RECIPES[name], policy=SlidingWindow(window)),
        device="cuda",
    ) as session:
        for _ in range(window + 4):
            session.step()
        torch.cuda.synchronize()
        return breakdown(lambda: [session.step() for _ in range(4)])


def idle_share(session: Session, *, steps: int = 4) -> float:
    """Share of a few steady steps in which no kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    session.step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            session.step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    if not spans:
        return float("nan")
    busy, at = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, at))
        at = max(at, end)
    return 1 - busy / (at - spans[0][0])


def several(denoiser: Denoiser, codec: WanVAECodec, *, count: int, chunks: int) -> dict[str, Any]:
    """`count` sessions in turn on one card against one session."""
    spec, rates, gaps = engine(RECIPES["c3-3 [4,2]"], policy=SlidingWindow(7)), {}, {}
    for number in (1, count):
        sessions = [
            Session(denoiser, codec, prompt(denoiser, seed=i), replace(spec, seed=i), device="cuda")
            for i in range(number)
        ]
        for _ in range(12):
            for session in sessions:
                session.step()
        torch.cuda.synchronize()
        last, found, frames, begin = [time.perf_counter()] * number, [], 0, time.perf_counter()
        for _ in range(chunks):
            for i, session in enumerate(sessions):
                frames += session.step().frames.shape[2]
                found.append(time.perf_counter() - last[i])
                last[i] = time.perf_counter()
        rates[number], gaps[number] = frames / (time.perf_counter() - begin), found
        for session in sessions:
            session.close()
    return {
        "fps_one": rates[1],
        f"fps_{count}": rates[count],
        "aggregate_over_one": rates[count] / rates[1],
        "p99_gap_over_count_x_single": (
            quantile(gaps[count], 0.99) / (count * statistics.median(gaps[1]))
        ),
    }


@command
def main(argv: list[str] | None = None) -> None:
    """Run the parts and print a table."""
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--attention", default="net", choices=("net", "fp8"), help="over the cache, of all streams"
    )
    parser.add_argument(
        "--parts", default="correct,c33,c11,steady,several,fp8", help="comma-separated"
    )
    parser.add_argument("--size", default="1.3B", choices=("1.3B", "14B"))
    parser.add_argument("--chunks", type=int, default=24, help="steady chunks that are timed")
    parser.add_argument("--out", type=writable_file, default="stream.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ConfigError("bench_stream needs a CUDA device")
    card = torch.cuda.get_device_name()
    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    report: dict[str, Any] = {
        "card": card,
        "versions": versions,
        "size": options.size,
        "date": time.strftime("%Y-%m-%d"),
    }
    begin = time.perf_counter()
    denoiser, codec = build(options.size), WanVAECodec.random(device="cuda")
    print(f"{card}, {versions}, built in {time.perf_counter() - begin:.1f} s", flush=True)
    CHOSEN["attention"] = options.attention
    bounded = {"num_frames": FRAMES}
    plain = {"graphs": "off", "look_ahead": False, "first_alone": False}
    parts = {
        "correct": {"": lambda: correct(denoiser, codec)},
        "baseline": {
            name: lambda name=name: video(
                denoiser, codec, engine(RECIPES[name], **bounded, **plain)
            )
            for name in ("c3-3 [4,2]", "c1-1 [4,1]")
        },
        "c33": {
            name: lambda name=name: video(denoiser, codec, engine(RECIPES[name], **bounded))
            for name in ("c3-3 [4,2]", "c3-3 [4,2] noisy")
        },
        "c11": {
            name: lambda name=name: video(denoiser, codec, engine(RECIPES[name], **bounded))
            for name in ("c1-1 [4,1]", "c1-1 [4,1] noisy")
        },
        "latents": {
            name: lambda name=name: video(denoiser, None, engine(RECIPES[name], **bounded))
            for name in ("c3-3 [4,2]", "c1-1 [4,1]")
        },
        "steady": {
            "c3-3 [4] window 21": lambda: steady(
                denoiser, codec, RECIPES["c3-3 [4]"], chunks=options.chunks
            ),
            "c1-1 [4,1] window 21": lambda: steady(
                denoiser, codec, RECIPES["c1-1 [4,1]"], chunks=options.chunks, window=21
            ),
        },
        "long": {
            "c3-3 [4,2] noisy, window 21 + sink": lambda: steady(
                denoiser, codec, RECIPES["c3-3 [4,2] noisy"], chunks=options.chunks, sinks=1
            )
        },
        "attention": {"parts": lambda: attention_in_parts(denoiser)},
        "own": {"kernels": lambda: own_attention(denoiser)},
        "profile": {
            "c3-3 [4]": lambda: profile_steady(denoiser, codec, "c3-3 [4]", 7),
            "c1-1 [4,1]": lambda: profile_steady(denoiser, codec, "c1-1 [4,1]", 21),
        },
        "host": {
            name: lambda name=name, w=w: host(denoiser, codec, name, w)
            for name, w in (("c3-3 [4]", 7), ("c1-1 [4,1]", 21))
        },
        "variants": {
            f"{i}: {name}, {products}, priority {p}": partial(
                compared, denoiser, codec, name, w, products == "one product", p
            )
            for name, w in (("c1-1 [4,1]", 21), ("c3-3 [4,2]", 7))
            for i, (products, p) in enumerate(
                (("three", 0), ("one product", 0), ("one product", -1), ("three", 0))
            )
        },
        "fp8": {
            which: lambda which=which: fp8(options.size, codec, which) for which in ("auto", "all")
        },
        "several": {"4 sessions": lambda: several(denoiser, codec, count=4, chunks=8)},
    }
    for part in options.parts.split(","):
        if part not in parts:
            parser.error(f"unknown part {part!r}; choose from {', '.join(parts)}")
    for part in options.parts.split(","):
        for name, run in parts[part].items():
            gc.collect()
            torch.cuda.empty_cache()
            try:
                found = run()
            except Exception as error:  # one part's failure must not hide the others' numbers
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            report.setdefault(part, {})[name] = found
            print(part, name, json.dumps(found, default=str), flush=True)
            write(options.out, report)
    failed = [
        f"{part} {name}"
        for part in parts
        for name, row in report.get(part, {}).items()
        if "error" in row
    ]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
