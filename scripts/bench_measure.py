"""How the step benchmarks measure: times and peaks of a call, GPU time by kind of kernel, and the
floor of a forward.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rcm.nets.attention import AttentionCore
from rcm.nets.frozen_fp8 import load_rows, scales_of
from rcm.parallel.fsdp import local, stored_parameters

GIB = 2**30
KINDS = (
    (
        "attention",
        (
            "attention",
            "sdpa",
            "fmha",
            "flash",
            "mha",
            "cudnn",
            "hopper_forward",
            "portable_forward",
            "_deposit",
        ),
    ),
    ("matrix product", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
    (
        "fused layers",
        (
            "norm_forward",
            "norm_tangent",
            "norm_backward",
            "gated_add",
            "gelu_forward",
            "gelu_backward",
            "rotate_pairs",
        ),
    ),
)


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
    return next(
        (kind for kind, words in KINDS if any(word in low for word in words)), "other elementwise"
    )


def breakdown(call: Callable[[], object]) -> dict[str, Any]:
    """GPU milliseconds by kind (`kinds_ms`), and the largest kernels of the kind "other
    elementwise" with their counts (`largest_others`).
    """
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    rest: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(
            "FSDP::"
        ):
            spent = event.time_range.elapsed_us() / 1e3
            kinds[kind_of(event.name)] += spent
            if kind_of(event.name) == "other elementwise":
                entry = rest.setdefault(event.name, [0.0, 0])
                entry[0] += spent
                entry[1] += 1
    largest = sorted(
        ((name, spent, int(count)) for name, (spent, count) in rest.items()),
        key=lambda row: -row[1],
    )
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

    hooks = [
        m.register_forward_pre_hook(see_product) for m in net.modules() if isinstance(m, nn.Linear)
    ]
    hooks += [
        m.register_forward_pre_hook(see_attention)
        for m in net.modules()
        if isinstance(m, AttentionCore)
    ]
    call()
    for hook in hooks:
        hook.remove()
    parts: list[dict[str, Any]] = []
    for (rows, width, out, dtype), count in products.items():
        operands = [
            torch.randn(shape, device="cuda").to(dtype)
            for shape in ((rows, width), (out, width), (out,))
        ]
        what = f"product {rows} x {width} x {out} {dtype}"
        parts.append(
            {
                "what": what,
                "count": count,
                "ms": alone(partial(F.linear, *operands), repeats=repeats),
            }
        )
    for key, count in attentions.items():
        operands = [torch.randn(shape, device="cuda").to(torch.bfloat16) for shape in key[:3]]
        what = f"attention of {key[0]} to {key[1][1]} keys"
        parts.append(
            {
                "what": what,
                "count": count,
                "ms": alone(partial(cores[key], *operands, key[3]), repeats=repeats),
            }
        )
    return {"parts": parts, "floor_ms": sum(part["count"] * part["ms"] for part in parts)}


def alone(call: Callable[[], object], *, repeats: int) -> float:
    """Milliseconds of one call among ten in a row, median of `repeats` rounds."""
    samples = []
    for _ in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 10)
    return statistics.median(samples[1:])


def write(path: str, content: object) -> None:
    """JSON, whole or not at all; what JSON does not know (paths, dtypes) as its text."""
    text = json.dumps(content, indent=1, default=str)
    with tempfile.NamedTemporaryFile(
        "w", dir=os.path.dirname(os.path.abspath(path)), delete=False
    ) as file:
        file.write(text)
    os.replace(file.name, path)
