"""What every benchmark has around its subject: flags, the machine, checks before times, the file
of its numbers; and how it measures: times and peaks of a call, GPU time by kind of kernel, the
floor of a forward.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError, first_line
from rcm.core.output_file import OutputFile
from rcm.inference.outcome import writable_file
from rcm.nets.attention import AttentionCore
from rcm.nets.frozen_fp8 import load_rows, scales_of
from rcm.parallel.fsdp import local, stored_parameters

GIB = 2**30
KINDS = {
    "attention": "attention sdpa fmha flash mha cudnn hopper_forward portable_forward _deposit",
    "matrix product": "gemm nvjet cutlass xmma cublas splitk",
    "rounding to FP8": "quantise_rows",
    "fused layers": "norm_forward norm_tangent norm_backward gated_add gelu_forward gelu_backward"
    " rotate_pairs",
}
"""Kind of kernel -> words, one of which its name has; the first kind that fits."""


class CheckFailed(ConfigError):
    """A result is not what it should be, so nothing that rests on it is timed; a sentence ends the
    command.
    """


def bench_flags(doc: str, *, file: str = "--json", default: str | None = None) -> Arguments:
    """The parser of a benchmark with the flag `file` for its numbers; `doc` is its help."""
    parser = Arguments(description=doc)
    parser.add_argument(
        file, type=writable_file, metavar="FILE", default=default, help="write all numbers there"
    )
    return parser


def present_folder(text: str) -> Path:
    """An argparse type: a folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder that is there; make it first")
    return Path(text)


def require_match(only: str, names: Iterable[str]) -> None:
    """`ConfigError` where `--only` is part of none of `names`."""
    known = list(dict.fromkeys(names))
    if not any(only in name for name in known):
        raise ConfigError(f"--only {only} is part of no name; choose from {', '.join(known)}")


def require_card(name: str, *, instead: str = "") -> None:
    """`ConfigError` without a GPU; `instead`: what can be done without one."""
    if not torch.cuda.is_available():
        raise ConfigError(f"{name} needs a CUDA device" + (f"; {instead}" if instead else ""))


def machine(device: str | torch.device = "cuda") -> dict[str, Any]:
    """What numbers are measured on: card or processor, versions, date."""
    on_card = torch.device(device).type == "cuda"
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if on_card else f"CPU, {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if on_card:
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version()}
        found |= {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def this_card(name: str, *, instead: str = "") -> dict[str, Any]:
    """`machine` of the GPU, printed; `ConfigError` without one, as `require_card`."""
    require_card(name, instead=instead)
    found = machine()
    print(in_words(found), flush=True)
    return found


def chosen_parts(words: str, known: Sequence[str], *, flag: str = "--parts") -> list[str]:
    """The comma-separated names in `words`; `ConfigError` for one that is not known."""
    names = words.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{flag}: unknown {unknown[0]!r}; choose from {', '.join(known)}")
    return names


def relative(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| in float64; infinite for what is not a number."""
    found, truth = found.double(), truth.double()
    error = ((found - truth).norm() / truth.norm()).item()
    return error if error == error else float("inf")


def require(checks: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Print errors beside their budgets; `CheckFailed` if any is above."""
    for name, (error, budget) in checks.items():
        print(f"  {name:66s} {error:9.2e}  (budget {budget:.0e})", flush=True)
    failed = [name for name, (error, budget) in checks.items() if not error <= budget]
    if failed:
        raise CheckFailed(f"above budget, so nothing is timed: {', '.join(failed)}")
    return {name: error for name, (error, _) in checks.items()}


def attempted(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds; its error in place of it, for one failure must not hide the other
    numbers. `CheckFailed` goes through.
    """
    try:
        return measure()
    except CheckFailed:
        raise
    except Exception as error:
        traceback.print_exc()
        return {"error": first_line(error)}


def in_words(row: Mapping[str, Any], *, without: Sequence[str] = ()) -> str:
    """Keys and values of a row on one line, numbers to four digits."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in without
    )


def write(target: OutputFile, content: object) -> None:
    """JSON, whole or not at all; what JSON does not know (paths, dtypes) as its text."""
    target.write(json.dumps(content, indent=1, default=str))


def forget(device: str | torch.device = "cuda") -> None:
    """Give back what the last measurement left: graphs with cycles, gathered parameters, the
    allocator's cache.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share q of them lies."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def drawn(
    queries: int,
    keys: int,
    heads: int,
    *,
    width: int,
    batch: int = 1,
    kind: str = "real-like",
    device: str = "cuda",
    shifted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, L, N, D] in bf16. "random": normal. "real-like": tokens of 64 kinds, channels of
    uneven size, a few channels with a large constant, as keys before rotation have them; `shifted`:
    every channel of the values with a constant.
    """
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    q, k, v = (normal(batch, n, heads, width) for n in (queries, keys, keys))
    if kind == "real-like":
        kinds, channels = torch.randint(64, (keys,), generator=g, device=device), (heads, width)
        spread, heavy = torch.exp(0.5 * normal(*channels)), 6 * normal(*channels)
        heavy *= torch.rand(*channels, generator=g, device=device) < 0.04
        k = spread * (normal(batch, 64, *channels)[:, kinds] + 0.4 * k) + heavy
        v = normal(batch, 64, *channels)[:, kinds] + 0.4 * v
        q, v = q / spread, v + 0.5 * normal(*channels) if shifted else v
    return tuple(x.to(torch.bfloat16) for x in (q, k, v))


def timed(
    call: Callable[[], object], *, repeats: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """First and median milliseconds of `call`, and the peak memory of one call in GiB, everything
    alive included.
    """
    samples = []
    for attempt in range(repeats + 1):
        prepare()
        torch.cuda.synchronize()
        if attempt == repeats:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - begin))
        del result
    return {
        "ms": statistics.median(samples[1:]),
        "first_ms": samples[0],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def alone(call: Callable[[], object], *, repeats: int) -> float:
    """Milliseconds of one call among ten in a row, median of `repeats` rounds."""
    return _rounds(lambda: [call() for _ in range(10)], repeats=repeats) / 10


def captured(call: Callable[[], object], *, repeats: int = 9) -> float:
    """Milliseconds of a call in a CUDA graph, median of replays. A short one stands in it again
    and again, up to 4 ms and 40 times.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), torch.no_grad():
        once = _rounds(call, repeats=1)
    torch.cuda.synchronize()
    times = max(1, min(40, int(4.0 / max(once, 1e-3))))
    with torch.no_grad(), torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return _rounds(graph.replay, repeats=repeats) / times


def _rounds(call: Callable[[], object], *, repeats: int) -> float:
    """Milliseconds of a call by the device's own clock, median after one that does not count."""
    samples = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return statistics.median(samples[1:])


@torch.no_grad()
def fill(net: nn.Module) -> None:
    """Random weights without zeros, the same on every rank: products of fan-in variance, norms
    around 1. Zeros would draw less power and run faster.
    """
    generators: dict[torch.device, torch.Generator] = {}
    parameters = stored_parameters(net)
    scales = scales_of(parameters)
    for name, parameter in parameters.items():
        if name in scales.values():
            continue
        shard = local(parameter.detach())
        generator = generators.setdefault(
            shard.device, torch.Generator(shard.device).manual_seed(0)
        )
        draws = torch.randn(shard.shape, generator=generator, device=shard.device)
        if name in scales:
            draws *= parameter.shape[-1] ** -0.5
            load_rows(shard, local(parameters[scales[name]].detach()), draws)
        elif parameter.ndim >= 2:
            shard.copy_(draws * parameter.shape[-1] ** -0.5)
        else:
            shard.copy_(0.02 * draws + float(name.endswith("weight")))


def kind_of(kernel: str) -> str:
    """Attention, matrix product, fused layer, or the rest."""
    low = kernel.lower()
    found = (kind for kind, words in KINDS.items() if any(word in low for word in words.split()))
    return next(found, "other elementwise")


def breakdown(call: Callable[[], object]) -> dict[str, Any]:
    """GPU milliseconds by kind (`kinds_ms`), and the largest kernels of the kind "other
    elementwise" with their counts (`largest_others`).
    """
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    rest: dict[str, tuple[float, int]] = {}
    for event in found.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if not on_device or event.name.startswith("FSDP::"):
            continue
        spent, kind = event.time_range.elapsed_us() / 1e3, kind_of(event.name)
        kinds[kind] += spent
        if kind == "other elementwise":
            total, count = rest.get(event.name, (0.0, 0))
            rest[event.name] = total + spent, count + 1
    largest = sorted(((name, *row) for name, row in rest.items()), key=lambda row: -row[1])
    return {
        "kinds_ms": {kind: round(spent, 2) for kind, spent in kinds.most_common()},
        "largest_others": largest[:10],
    }


def floor_of(net: nn.Module, call: Callable[[], object], *, repeats: int) -> dict[str, Any]:
    """Every product and attention call of one forward `call` of `net`, timed alone, and `floor_ms`,
    their sum times their counts.
    """
    products: Counter[tuple] = Counter()
    attentions: Counter[tuple] = Counter()
    cores: dict[tuple, AttentionCore] = {}

    def see_product(module: nn.Linear, args: tuple) -> None:
        x = args[0]
        products[x.numel() // x.shape[-1], module.in_features, module.out_features, x.dtype] += 1

    def see_attention(module: AttentionCore, args: tuple) -> None:
        key = (*(tuple(x.shape) for x in args[:3]), args[3] if len(args) > 3 else None)
        attentions[key] += 1
        cores[key] = module

    watchers = (nn.Linear, see_product), (AttentionCore, see_attention)
    hooks = [
        module.register_forward_pre_hook(see)
        for module in net.modules()
        for kind, see in watchers
        if isinstance(module, kind)
    ]
    call()
    for hook in hooks:
        hook.remove()
    parts: list[dict[str, Any]] = []
    for (rows, width, out, dtype), count in products.items():
        shapes = ((rows, width), (out, width), (out,))
        operands = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
        what, call = f"product {rows} x {width} x {out} {dtype}", partial(F.linear, *operands)
        parts.append({"what": what, "count": count, "ms": alone(call, repeats=repeats)})
    for key, count in attentions.items():
        operands = [torch.randn(shape, device="cuda").to(torch.bfloat16) for shape in key[:3]]
        call = partial(cores[key], *operands, key[3])
        what = f"attention of {key[0]} to {key[1][1]} keys"
        parts.append({"what": what, "count": count, "ms": alone(call, repeats=repeats)})
    return {"parts": parts, "floor_ms": sum(part["count"] * part["ms"] for part in parts)}
