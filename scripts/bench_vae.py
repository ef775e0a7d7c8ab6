"""Wan autoencoder at full size with random weights: correctness first, then times and memory, as a
table and JSON.

    python -m scripts.bench_vae [--json FILE] [--height 480 --width 832 --frames 81] [--repeats \\
        5] [--profile]
    python -m scripts.bench_vae --cold [--json FILE]

Speed does not depend on the values of the weights. A failed check ends the run before anything is
timed. Quote ratios of one run; machines differ by 10 %. `--cold` times the start alone: fresh
processes, with nothing compiled and with Triton's cache on disk filled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.encoders.taehv import TinyDecoderCodec
from rcm.encoders.wan_vae import WanVAECodec
from rcm.inference.outcome import command
from scripts.bench_measure import (
    CheckFailed,
    bench_flags,
    in_words,
    relative,
    require,
    require_card,
    this_card,
    timed,
    write,
)

DEVICE = "cuda"
SMALL = (12, 20)
# release of June 2026 on the same kind of card, and the target
RELEASE_MS, TARGET_MS, TARGET_TOTAL_S, TARGET_COLD_S = 77.0, 45.0, 1.0, 3.0


def check() -> dict[str, float]:
    """Errors against their budgets, see `require`."""
    fast, exact = (
        WanVAECodec.random(device=DEVICE, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    exact.vae.load_state_dict(fast.vae.state_dict())
    latents = torch.randn(1, 16, 5, *SMALL, device=DEVICE)
    video = torch.rand(1, 3, 9, 8 * SMALL[0], 8 * SMALL[1], device=DEVICE) * 2 - 1
    whole, sharp = fast.decode(latents), exact.decode(latents)
    stream = fast.stream()
    pieces = torch.cat(
        [stream.decode_chunk(part) for part in latents.split([2, 1, 2], dim=2)], dim=2
    )
    exact_stream = exact.stream()
    exact_pieces = torch.cat(
        [exact_stream.decode_chunk(part) for part in latents.split([1, 3, 1], dim=2)], dim=2
    )
    first, second = fast.stream(graphs="on"), fast.stream(graphs="on")
    plain, other = fast.stream(), torch.randn_like(latents)
    graphed, expected = [], []
    for part, disturbing in zip(latents.split(1, dim=2), other.split(1, dim=2), strict=True):
        graphed.append(first.decode_chunk(part))
        second.decode_chunk(disturbing)
        expected.append(plain.decode_chunk(part))
    fast.vae.use("direct")
    library = fast.decode(latents)
    fast.vae.use(None)
    errors = {
        "decode, bfloat16 against float32": (relative(whole, sharp), 4e-2),
        "encode, bfloat16 against float32": (
            relative(fast.encode(video), exact.encode(video)),
            4e-2,
        ),
        "decode, our convolutions against the library's": (relative(whole, library), 3e-2),
        "library's convolutions against float32": (relative(library, sharp), 4e-2),
        "streamed against one-shot, bfloat16": (relative(pieces, whole), 3e-2),
        "streamed against one-shot, float32": (relative(exact_pieces, sharp), 1e-5),
        "CUDA graph against plain, two streams interleaved": (
            relative(torch.cat(graphed, 2), torch.cat(expected, 2)),
            0.0,
        ),
    }
    return require(errors)


def cold_starts(*, height: int, width: int) -> dict[str, dict[str, float]]:
    """Seconds of the stages of fresh processes up to three latent frames: kernels compiled one by
    one at their first launch ("plain") or ahead and side by side ("ahead"), each with an empty
    cache directory and then with the one that it filled.
    """
    found = {}
    for way in ("ahead", "plain"):
        with tempfile.TemporaryDirectory() as cache:
            for disk in ("empty", "filled"):
                words = [sys.executable, "-m", "scripts.bench_vae", "--cold-child", way]
                words += ["--height", str(height), "--width", str(width)]
                environment = {"TRITON_CACHE_DIR": cache, "RCM_BENCH_START": repr(time.time())}
                done = subprocess.run(
                    words,
                    env=os.environ | environment,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=300,
                )
                if done.returncode:
                    raise CheckFailed(
                        f"the process with {way}, cache {disk} failed:"
                        f" {done.stderr.strip()[-2000:]}"
                    )
                found[f"{way}, cache {disk}"] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def cold_child(options: argparse.Namespace) -> dict[str, float]:
    """One start, in this process: seconds per stage."""
    begun, times = float(os.environ["RCM_BENCH_START"]), {}
    times["python and imports"] = time.time() - begun

    def lap(name: str) -> None:
        torch.cuda.synchronize()
        times[name] = time.time() - begun - sum(times.values())

    torch.zeros(1, device=DEVICE)
    lap("CUDA context")
    codec = WanVAECodec.random(device=DEVICE, dtype=torch.bfloat16)
    latents = torch.randn(1, 16, 3, options.height // 8, options.width // 8, device=DEVICE)
    lap("random weights")
    if options.cold_child == "ahead":
        codec.warm_up((options.height, options.width))
        lap("compilation ahead")
    stream = codec.stream()
    for index, chunk in enumerate(latents.split(1, dim=2)):
        stream.decode_chunk(chunk)
        lap(f"latent frame {index + 1}")
    work = ("compilation ahead", "latent frame 1", "latent frame 2", "latent frame 3")
    times["three frames with compilation"] = sum(times.get(name, 0.0) for name in work)
    return times


def show_cold(found: dict[str, dict[str, float]]) -> None:
    """The table of starts."""
    for name, times in found.items():
        print(f"{name:22s} {in_words(times)} s")
    print(f"target: {TARGET_COLD_S} s for three frames with compilation and an empty cache")


def streaming(
    codec: WanVAECodec | TinyDecoderCodec,
    latents: Tensor,
    *,
    per_chunk: int,
    graphs: str,
    repeats: int,
) -> dict[str, float]:
    """Milliseconds of the first latent frame and per later one, pixels included, in chunks of
    `per_chunk` that are not split further; `launch_ms` is how long the host is busy with a later
    one.
    """
    stream = codec.stream(frames_per_step=per_chunk, graphs=graphs)
    first, steady, launch = [], [], []
    chunks = latents[:, :, :1], *latents[:, :, 1 : 1 + 3 * per_chunk].split(per_chunk, dim=2)
    for number in range(repeats + 1):
        stream.restart()
        for index, chunk in enumerate(chunks):
            torch.cuda.synchronize()
            start = time.perf_counter()
            stream.decode_chunk(chunk)
            returned = time.perf_counter()
            torch.cuda.synchronize()
            if number:  # the first round compiles, packs and captures
                spent = 1e3 * (time.perf_counter() - start) / chunk.shape[2]
                (steady if index else first).append(spent)
                launch += [1e3 * (returned - start) / chunk.shape[2]] if index else []
    found = {"first_ms": first, "steady_ms": steady, "launch_ms": launch}
    return {name: statistics.median(spent) for name, spent in found.items()}


def _whole(call: Callable[[], object], *, repeats: int) -> dict[str, float]:
    """Median milliseconds and peak GiB, weights included."""
    found = timed(call, repeats=repeats)
    return {"total_ms": found["ms"], "peak_gib": found["peak_gib"]}


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All times and memory of the full-size codec in bfloat16."""
    cells, count = (options.height // 8, options.width // 8), 1 + (options.frames - 1) // 4
    codec = WanVAECodec.random(device=DEVICE, dtype=torch.bfloat16)
    latents = torch.randn(1, 16, count, *cells, device=DEVICE)
    result: dict[str, object] = {}
    result["streaming"] = {
        f"{per_chunk} per chunk, graphs {graphs}": streaming(
            codec, latents, per_chunk=per_chunk, graphs=graphs, repeats=options.repeats
        )
        for per_chunk in (1, 3)
        for graphs in ("off", "on")
    }
    tiny = TinyDecoderCodec.random(device=DEVICE, dtype=torch.bfloat16)
    how = {"per_chunk": 3, "graphs": "off", "repeats": options.repeats}
    result["tiny_decoder"] = streaming(tiny, latents, **how)
    result["one_shot"] = {
        f"{step} per step": _whole(
            lambda step=step: codec.decode(latents, frames_per_step=step), repeats=options.repeats
        )
        for step in (1, 2, 4, 5, 10)
    }
    video = torch.rand(1, 3, options.frames, options.height, options.width, device=DEVICE) * 2 - 1
    result["encode"] = {
        f"{step} pixel frames per step": _whole(
            lambda step=step: codec.encode(video, frames_per_step=step), repeats=options.repeats
        )
        for step in (4, 8, 16)
    }
    codec.tile = 32
    tiled = _whole(lambda: codec.decode(latents), repeats=1)
    result["tiled"] = {"tile": 32, "decode_ms": tiled["total_ms"], "peak_gib": tiled["peak_gib"]}
    codec.tile = None
    if options.profile:
        profile(codec, latents)
    return result


def profile(codec: WanVAECodec, latents: Tensor) -> None:
    """Kernel times of one steady step, longest first."""
    stream = codec.stream()
    stream.decode_chunk(latents[:, :, :3])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watched:
        stream.decode_chunk(latents[:, :, 3:4])
        torch.cuda.synchronize()
    events = sorted(
        (e for e in watched.key_averages() if e.self_device_time_total > 0),
        key=lambda e: -e.self_device_time_total,
    )
    total = sum(e.self_device_time_total for e in events)
    print(
        f"kernels of one steady step: {total / 1e3:.2f} ms in {sum(e.count for e in events)}"
        " launches"
    )
    for event in events[:16]:
        print(
            f"  {event.self_device_time_total / 1e3:8.3f} ms  {event.count:4d} x  {event.key[:90]}"
        )


def show(result: dict[str, object], options: argparse.Namespace) -> None:
    """The table."""
    print(
        f"\n{options.frames} frames at {options.height}x{options.width}, bfloat16, batch 1"
        f" (release: {RELEASE_MS} ms per latent frame)"
    )
    show_cold(result["cold_start"])
    for name, row in (result["streaming"] | {"tiny decoder": result["tiny_decoder"]}).items():
        times = (
            f"first {row['first_ms']:7.2f} ms   steady {row['steady_ms']:7.2f} ms per latent frame"
        )
        print(f"stream, {name:28s} {times} (host busy {row['launch_ms']:.2f})")
    for name, row in result["one_shot"].items():
        print(f"decode, {name:28s} {row['total_ms']:8.1f} ms   peak {row['peak_gib']:6.2f} GiB")
    for name, row in result["encode"].items():
        print(f"encode, {name:28s} {row['total_ms']:8.1f} ms   peak {row['peak_gib']:6.2f} GiB")
    tiled = result["tiled"]
    print(
        f"decode, tiles of {tiled['tile']} cells{'':14s} {tiled['decode_ms']:8.1f} ms   peak"
        f" {tiled['peak_gib']:6.2f} GiB"
    )
    steady = min(row["steady_ms"] for row in result["streaming"].values())
    total = min(row["total_ms"] for row in result["one_shot"].values()) / 1e3
    print(
        f"targets: {steady:.1f} of {TARGET_MS} ms per latent frame, {total:.2f} of {TARGET_TOTAL_S}"
        " s in all"
    )


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, check, measure, print."""
    parser = bench_flags(__doc__)
    add = parser.add_argument
    add("--height", type=int, default=480)
    add("--width", type=int, default=832)
    add("--frames", type=int, default=81, help="1 + 4 k, at least 37 [%(default)s]")
    add("--repeats", type=int, default=5)
    add("--profile", action="store_true", help="print the kernels of one steady step")
    add("--cold", action="store_true", help="time the start of fresh processes only")
    add("--cold-child", choices=("ahead", "plain"), help=argparse.SUPPRESS)
    parser.idle("frames", "repeats", "profile", beside="cold")
    options = parser.parse_args(arguments)
    if options.frames % 4 != 1 or options.frames < 37:  # the chunks that are streamed
        raise ConfigError(f"--frames {options.frames} must be 1 + 4 k, at least 37")
    for flag in ("height", "width"):
        if getattr(options, flag) % 8:
            raise ConfigError(f"--{flag} {getattr(options, flag)} must be a multiple of 8")
    instead = "on the CPU run the tests in tests/encoders"
    if options.cold_child:
        require_card("bench_vae", instead=instead)
        print(json.dumps(cold_child(options)))
        return
    machine = this_card("bench_vae", instead=instead)
    cold = cold_starts(height=options.height, width=options.width)
    if options.cold:
        result = {"cold_start": cold}
        show_cold(cold)
    else:
        result = {"errors": check(), "cold_start": cold, **measure(options)}
        show(result, options)
    if options.json:
        write(options.json, {"machine": machine, **result})


if __name__ == "__main__":
    sys.exit(main())
