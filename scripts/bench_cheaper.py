"""Cheaper arithmetic and a quicker start on one card, random weights at full size: checks, times, a
table and JSON.

    python -m scripts.bench_cheaper [--json FILE] [--parts vae_cold,fp8_check,fp8_layers,...]

Every part runs in a process of its own: an error of one is printed and leaves the others alone. A
part whose check fails times nothing. Products are timed inside a CUDA graph over weights that
together exceed the L2 cache, as a network's do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.errors import first_line
from rcm.inference.outcome import command
from scripts.bench_cold import DEVICE, HIDDEN, WIDTH, kernels_cold, kernels_cold_serial, vae_cold
from scripts.bench_measure import (
    CheckFailed,
    bench_flags,
    captured,
    chosen_parts,
    in_words,
    relative,
    require,
    require_card,
    this_card,
    write,
)

ROWS = (4680, 1560, 780)
"""Tokens of a chunk of three frames and of one at 480x832, and of one frame over two cards."""
COPIES = 8
CELLS = (60, 104)
LAYERS = {
    "qkv": (WIDTH, 3 * WIDTH, False),
    "o": (WIDTH, WIDTH, False),
    "cross_q": (WIDTH, WIDTH, False),
    "cross_o": (WIDTH, WIDTH, False),
    "ffn_in": (WIDTH, HIDDEN, False),
    "ffn_out": (HIDDEN, WIDTH, True),
}
"""Choice of FP8 layers to channels in, channels out, and whether a GELU comes before."""


def random_linear(inputs: int, outputs: int) -> nn.Linear:
    """A bfloat16 layer without gradient, weights of the size that training leaves."""
    layer = nn.Linear(inputs, outputs, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(std=inputs**-0.5)
    layer.bias.normal_(std=0.1)
    return layer


def fp8_check() -> dict[str, Any]:
    """The kernel against its formula, products against emulation and float64, a captured layer
    against the eager one.
    """
    from rcm.kernels.fused import quantise
    from rcm.nets.fp8_linear import FP8Linear

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    checks: dict[str, tuple[float, float]] = {}
    for rows, width in ((1560, WIDTH), (4680, HIDDEN), (33, 48)):
        x = (
            torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
            * torch.rand(rows, 1, device=DEVICE).mul(9).exp().bfloat16()
        )
        (q, scale), (plain, plain_scale) = quantise.launch(x, gelu=False), quantise.reference(x)
        checks[f"rounded {rows} x {width}: share that differs"] = (
            (q.float() != plain.float()).float().mean().item(),
            0.0,
        )
        checks[f"scales {rows} x {width}: greatest difference"] = (
            (scale / plain_scale - 1).abs().max().item(),
            2e-7,
        )
        x = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
        q, scale = quantise.launch(x, gelu=True)
        checks[f"GELU and rounding {rows} x {width}"] = (
            relative(q.double() * scale, F.gelu(x.double(), approximate="tanh")),
            4e-2,
        )
    odd = torch.zeros(4, 64, device=DEVICE, dtype=torch.bfloat16)
    odd[1, 3], odd[2, 5] = float("nan"), float("inf")
    y = FP8Linear(random_linear(64, 32))(odd)
    checks["rows with NaN or infinity that come out finite"] = (float(y[1:3].isfinite().any()), 0.0)
    checks["rows of zeros that come out wrong"] = (float(not y[::3].isfinite().all()), 0.0)
    for name, (inputs, outputs, gelu) in LAYERS.items():
        layer, x = (
            random_linear(inputs, outputs),
            torch.randn(1560, inputs, device=DEVICE, dtype=torch.bfloat16),
        )
        fast = FP8Linear(layer, gelu=gelu)
        seen = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
        exact = F.linear(seen, layer.weight.double(), layer.bias.double())
        (q, scale), found = quantise.launch(x, gelu=gelu), fast(x)
        emulated = (
            q.float() @ fast.weight.float().t()
        ) * scale * fast.weight_scale.t() + layer.bias.float()
        checks[f"{name}: FP8 product against its emulation"] = (relative(found, emulated), 1e-2)
        checks[f"{name}: FP8 layer against float64"] = (relative(found, exact), 6e-2)
        held, graph = x.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = fast(held)
        held.copy_(x.flip(0))
        graph.replay()
        checks[f"{name}: captured against eager"] = (relative(replayed, fast(x.flip(0))), 0.0)
    return {"errors": require(checks)}


def fp8_layers() -> dict[str, Any]:
    """bfloat16 against FP8 per layer and number of rows, with the parts of FP8, and which wins."""
    from rcm.kernels.fused import quantise
    from rcm.kernels.fused.launch import gelu as fused_gelu
    from rcm.nets.fp8_linear import FP8Linear

    found: dict[str, Any] = {}
    for rows in ROWS:
        for name, (inputs, outputs, gelu) in LAYERS.items():
            layers = [random_linear(inputs, outputs) for _ in range(COPIES)]
            fast = [FP8Linear(layer, gelu=gelu) for layer in layers]
            xs = [
                torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16)
                for _ in range(COPIES)
            ]
            rounded = [quantise.quantise_rows(x, gelu=gelu) for x in xs]
            one = torch.ones((), device=DEVICE)

            def plain(layer: nn.Linear, x: Tensor, gelu: bool = gelu) -> Tensor:
                return layer(fused_gelu(x, None)[0] if gelu else x)

            def product(layer: FP8Linear, r: tuple[Tensor, Tensor]) -> Tensor:
                return quantise.product(
                    r, (layer.weight, layer.weight_scale), layer.bias, dtype=torch.bfloat16
                )

            def tensorwise(layer: FP8Linear, r: tuple[Tensor, Tensor], one: Tensor = one) -> Tensor:
                scales = {"scale_a": one, "scale_b": one}
                return torch._scaled_mm(
                    r[0],
                    layer.weight.t(),
                    **scales,
                    bias=layer.bias,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )

            pairs = list(zip(layers, fast, xs, rounded, strict=True))
            row = {
                "bf16_ms": captured(*(lambda p=p: plain(p[0], p[2]) for p in pairs)),
                "fp8_ms": captured(*(lambda p=p: p[1](p[2]) for p in pairs)),
                "fp8_product_ms": captured(*(lambda p=p: product(p[1], p[3]) for p in pairs)),
                "fp8_rounding_ms": captured(
                    *(lambda x=x, g=gelu: quantise.quantise_rows(x, gelu=g) for x in xs)
                ),
            }
            try:
                row["fp8_product_one_scale_ms"] = captured(
                    *(lambda p=p: tensorwise(p[1], p[3]) for p in pairs)
                )
            except Exception as error:
                print(f"  product with one scale: {first_line(error)}")
            if name == "qkv":
                thirds = [
                    [random_linear(inputs, outputs // 3) for _ in range(3)] for _ in range(COPIES)
                ]
                apart = [[FP8Linear(layer) for layer in three] for three in thirds]
                row["bf16_three_ms"] = captured(
                    *(lambda t=t, x=x: [y(x) for y in t] for t, x in zip(thirds, xs, strict=True))
                )
                row["fp8_three_ms"] = captured(
                    *(lambda t=t, x=x: [y(x) for y in t] for t, x in zip(apart, xs, strict=True))
                )
            base = row.get("bf16_three_ms", row["bf16_ms"])
            row["gain"] = base / row["fp8_ms"]
            found[f"{name}, {rows} rows"] = row
            flops = 2 * rows * inputs * outputs * 1e-9
            detail = "  ".join(
                f"{key[:-3]} {1e3 * value:.1f}" for key, value in row.items() if key.endswith("_ms")
            )
            winner = "fp8" if row["gain"] > 1 else "bf16"
            speed = f"{flops / base:.0f} and {flops / row['fp8_ms']:.0f} TFLOP/s"
            print(
                f"  {name:8s} {rows:5d} x {inputs} x {outputs}: {detail} us; gain"
                f" {row['gain']:.2f}, {winner} ({speed})",
                flush=True,
            )
    return found


def fp8_network() -> dict[str, Any]:
    """A captured forward of the 1.3B network on chunks of three frames and one: bfloat16 against
    FP8, and its error.
    """
    from rcm.nets.wan.config import preset
    from rcm.nets.wan.fp8 import LAYERS as NAMES
    from rcm.nets.wan.fp8 import noise_velocity, quantise_linears_
    from rcm.nets.wan.model import WanDiT

    with torch.device(DEVICE):
        plain = WanDiT(preset("1.3B"), fused="on").to(torch.bfloat16).requires_grad_(False).eval()
    plain.init_weights(torch.Generator(DEVICE).manual_seed(0))
    torch.manual_seed(0)
    plain.head.head.weight.normal_(std=WIDTH**-0.5)
    found: dict[str, Any] = {}
    for which in ("bf16", "auto", "all", *NAMES):
        net, row = deepcopy(plain), {}
        if which != "bf16":
            report = quantise_linears_(
                net, which=which, velocity=noise_velocity(net, size=CELLS, frames=3)
            )
            row["error"] = report.error
            if not 0 < report.error < 0.3:
                raise CheckFailed(f"{which}: error of the velocity is {report.error}")
        for frames in (3, 1):
            forward = chunk_forward(net, frames)
            row[f"{frames}_frames_ms"] = captured(forward)
            row[f"{frames}_frames_gain"] = (
                found.get("bf16", row)[f"{frames}_frames_ms"] / row[f"{frames}_frames_ms"]
            )
        row["weights_gib"] = sum(x.nbytes for x in (*net.parameters(), *net.buffers())) / 2**30
        found[which] = row
        print(f"  {which:8s} {in_words(row)}", flush=True)
        del net, forward
    return found


def chunk_forward(net: nn.Module, frames: int) -> Callable[[], Tensor]:
    """A forward of `frames` noisy frames that see each other, the prompt's keys and values computed
    before.
    """
    from rcm.nets.condition import Condition
    from rcm.nets.layout import TokenLayout

    x = torch.randn(1, 16, frames, *CELLS, device=DEVICE, dtype=torch.bfloat16)
    cond = net.prepare(Condition(torch.randn(1, 512, 4096, device=DEVICE, dtype=torch.bfloat16)))
    time_of_all = torch.full((1, 1), 500.0, device=DEVICE)
    layout = TokenLayout.bidirectional(frames, grid=net.config.token_grid(*CELLS))
    return lambda: net(x, time_of_all, cond, layout)


def tiny_decoder() -> dict[str, Any]:
    """The tiny decoder: streamed against one-shot, bfloat16 against float32; milliseconds beside
    the full one.
    """
    from rcm.encoders.taehv import TinyDecoderCodec
    from rcm.encoders.wan_vae import WanVAECodec

    torch.manual_seed(0)
    fast = TinyDecoderCodec.random(device=DEVICE, dtype=torch.bfloat16)
    exact = TinyDecoderCodec.random(device=DEVICE, dtype=torch.float32)
    exact.net.load_state_dict(fast.net.state_dict())
    latents = torch.randn(1, 16, 6, 12, 20, device=DEVICE)
    whole, stream = exact.decode(latents), exact.stream()
    pieces = torch.cat(
        [stream.decode_chunk(part) for part in latents.split([1, 3, 2], dim=2)], dim=2
    )
    found: dict[str, Any] = {
        "errors": require(
            {
                "streamed against one-shot, float32": (relative(pieces, whole), 1e-5),
                "bfloat16 against float32": (relative(fast.decode(latents), whole), 5e-2),
            }
        )
    }
    latents = torch.randn(1, 16, 13, *CELLS, device=DEVICE)
    full = WanVAECodec.random(device=DEVICE, dtype=torch.bfloat16)
    for name, codec in (("tiny", fast), ("full", full)):
        for per_chunk in (1, 3):
            for graphs in ("off", "on"):
                stream, spent = codec.stream(graphs=graphs), []
                for _ in range(3):
                    stream.restart()
                    for chunk in (latents[:, :, :1], *latents[:, :, 1:].split(per_chunk, dim=2)):
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                        stream.decode_chunk(chunk)
                        torch.cuda.synchronize()
                        spent.append(1e3 * (time.perf_counter() - start) / chunk.shape[2])
                row = {"steady_ms": sorted(spent[-8:])[4], "state_mib": stream.num_bytes() / 2**20}
                key = f"{name}, {per_chunk} per chunk, graphs {graphs}"
                found[key] = row
                print(
                    f"  {key:34s} {row['steady_ms']:7.2f} ms per latent frame, state"
                    f" {row['state_mib']:.0f} MiB",
                    flush=True,
                )
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "vae_cold": vae_cold,
    "kernels_cold": kernels_cold,
    "kernels_cold_serial": kernels_cold_serial,
    "fp8_check": fp8_check,
    "fp8_layers": fp8_layers,
    "fp8_network": fp8_network,
    "tiny_decoder": tiny_decoder,
}


def run_part(name: str, *, limit_s: int) -> dict[str, Any]:
    """The result of one part, from a process of its own; its error in place of it."""
    print(f"{name}: {PARTS[name].__doc__.splitlines()[0]}", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        words = [sys.executable, "-m", "scripts.bench_cheaper", "--child", name]
        try:
            done = subprocess.run(
                [*words, "--json", str(target)],
                check=False,
                timeout=limit_s,
                stderr=subprocess.PIPE,
                text=True,
            )
            error = None if done.returncode == 0 else done.stderr.strip()[-3000:]
            result = json.loads(target.read_text()) if error is None else {"error": error}
        except (subprocess.TimeoutExpired, OSError, ValueError) as problem:
            result = {"error": first_line(problem)}
    if "error" in result:
        print(f"  FAILED: {result['error']}", flush=True)
    print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    return result


@command
def main(arguments: list[str] | None = None) -> None:
    """Run the parts, print, write."""
    parser = bench_flags(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--limit", type=int, default=240, help="seconds per part")
    parser.add_argument("--child", choices=tuple(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = chosen_parts(options.parts, list(PARTS))
    instead = "on the CPU run the tests in tests/nets/test_fp8_linear.py and tests/encoders"
    if options.child:
        require_card("bench_cheaper", instead=instead)
        write(options.json, PARTS[options.child]())
        return
    found: dict[str, Any] = {"machine": this_card("bench_cheaper", instead=instead)}
    for name in chosen:
        found[name] = run_part(name, limit_s=options.limit)
        if options.json:
            write(options.json, found)
    if failed := [name for name in chosen if "error" in found[name]]:
        sys.exit(f"parts that failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(main())
