"""Speed of streams at full size with random weights: correctness first, then latencies, gaps,
memory, idle share.

    python -m scripts.bench_stream --out stream.json                 # every part, one GPU
    python -m scripts.bench_stream --parts correct,c33,c11,steady

Times are wall-clock, from the call to pixels in host memory (uint8, pinned), the text already
encoded; medians of several videos after one that compiles and captures. Floors are the products and
attention calls of the passes and the decoder's convolutions, each timed alone.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rcm.encoders.wan_vae import WanVAECodec
from rcm.inference.outcome import command
from rcm.nets.denoiser import Denoiser
from rcm.nets.wan.fp8 import noise_velocity, quantise_linears_
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.sliding_window import SlidingWindow
from scripts.bench_measure import (
    attempted,
    bench_flags,
    breakdown,
    chosen_parts,
    forget,
    quantile,
    relative,
    require,
    this_card,
    write,
)
from scripts.bench_stream_runs import (
    CHOSEN,
    FRAMES,
    LATENT,
    RECIPES,
    build,
    engine,
    opened,
    prompt,
    steady,
    video,
)

BUDGET = 2e-2
"""Relative difference of latents, bfloat16 either way; 7e-3 was seen."""


def correct(denoiser: Denoiser) -> dict[str, Any]:
    """Captured against eager on the same noise: latents of two windows' length, bf16; prompt
    changes and window wrap included. `CheckFailed` beyond `BUDGET`, FP8 attention excepted.
    """
    plain = build("1.3B", fused="off")
    plain.net.load_state_dict(denoiser.net.state_dict())
    found, asked = {}, CHOSEN["attention"]
    budget = BUDGET if asked == "net" else math.inf
    for name, frames in (("c3-3 [4,2]", 15), ("c1-1 [4,1]", 7), ("c1-1 [4,2] noisy", 7)):
        recipe, out = RECIPES[name], {}
        for kind, net, graphs, attention in (
            ("eager plain", plain, "off", "net"),
            ("eager fused", denoiser, "off", asked),
            ("captured", denoiser, "on", asked),
        ):
            options = {"num_frames": frames, "policy": SlidingWindow(3, 1), "draw_on": "cuda"}
            spec = StreamSpec(recipe, LATENT, graphs=graphs, attention=attention, **options)
            with Session(net, None, prompt(net), spec, device="cuda") as session:
                parts = []
                while (chunk := session.step()) is not None:
                    parts.append(chunk.latents)
                    if len(parts) == 3:
                        session.set_condition(prompt(net, seed=1))
            out[kind] = torch.cat(parts, dim=2)
        truth = out["eager plain"]
        errors = {k: relative(out[k], truth) for k in ("eager fused", "captured")}
        require({f"{name}, {kind}": (error, budget) for kind, error in errors.items()})
        largest = float((out["captured"] - out["eager fused"]).abs().max())
        found[name] = {**errors, "captured against eager fused, largest": largest}
    return found


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


def profile_steady(
    denoiser: Denoiser, codec: WanVAECodec, name: str, window: int
) -> dict[str, Any]:
    """GPU time of four steady steps by kind of kernel."""
    with opened(denoiser, codec, name, policy=SlidingWindow(window)) as session:
        for _ in range(window + 4):
            session.step()
        torch.cuda.synchronize()
        return breakdown(lambda: [session.step() for _ in range(4)])


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


def parts_of(
    denoiser: Denoiser, codec: WanVAECodec, *, size: str, chunks: int
) -> dict[str, dict[str, Callable[[], dict[str, Any]]]]:
    """Part -> row -> what measures it."""

    def videos(
        *names: str, decoder: WanVAECodec | None = codec, **options: Any
    ) -> dict[str, Callable[[], dict[str, Any]]]:
        def measure(name: str) -> dict[str, Any]:
            return video(denoiser, decoder, engine(RECIPES[name], num_frames=FRAMES, **options))

        return {name: partial(measure, name) for name in names}

    def endless(name: str, **options: Any) -> Callable[[], dict[str, Any]]:
        return partial(steady, denoiser, codec, RECIPES[name], chunks=chunks, **options)

    windows = {"c3-3 [4]": 7, "c1-1 [4,1]": 21}
    plain = {"graphs": "off", "look_ahead": False, "first_alone": False}
    return {
        "correct": {"": partial(correct, denoiser)},
        "baseline": videos("c3-3 [4,2]", "c1-1 [4,1]", **plain),
        "c33": videos("c3-3 [4,2]", "c3-3 [4,2] noisy"),
        "c11": videos("c1-1 [4,1]", "c1-1 [4,1] noisy"),
        "latents": videos("c3-3 [4,2]", "c1-1 [4,1]", decoder=None),
        "steady": {f"{n} window 21": endless(n, window=w) for n, w in windows.items()},
        "long": {"c3-3 [4,2] noisy, window 21 + sink": endless("c3-3 [4,2] noisy", sinks=1)},
        "profile": {n: partial(profile_steady, denoiser, codec, n, w) for n, w in windows.items()},
        "fp8": {which: partial(fp8, size, codec, which) for which in ("auto", "all")},
        "several": {"4 sessions": partial(several, denoiser, codec, count=4, chunks=8)},
    }


@command
def main(argv: list[str] | None = None) -> None:
    """Run the parts and print a table."""
    parser = bench_flags(__doc__, file="--out", default="stream.json")
    add = parser.add_argument
    add("--attention", default="net", choices=("net", "fp8"), help="over the cache, of all streams")
    add("--parts", default="correct,c33,c11,steady,several,fp8", help="comma-separated")
    add("--size", default="1.3B", choices=("1.3B", "14B"))
    add("--chunks", type=int, default=24, help="steady chunks that are timed")
    parser.idle("chunks", beside="parts", when=lambda options: "steady" not in options.parts)
    options = parser.parse_args(argv)
    report: dict[str, Any] = {**this_card("bench_stream"), "size": options.size}
    begin = time.perf_counter()
    denoiser, codec = build(options.size), WanVAECodec.random(device="cuda")
    print(f"built in {time.perf_counter() - begin:.1f} s", flush=True)
    CHOSEN["attention"] = options.attention
    parts = parts_of(denoiser, codec, size=options.size, chunks=options.chunks)
    for part in chosen_parts(options.parts, list(parts)):
        for name, run in parts[part].items():
            forget()
            found = attempted(run)
            report.setdefault(part, {})[name] = found
            print(part, name, json.dumps(found, default=str), flush=True)
            write(options.out, report)
    rows = [(part, name, row) for part in parts for name, row in report.get(part, {}).items()]
    if failed := [f"{part} {name}" for part, name, row in rows if "error" in row]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(main())
