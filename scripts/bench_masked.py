"""Masked attention with gradient, back end by back end: the second part of
`scripts.bench_attention`.

Errors come first: at small size against float64 within twice the error of eager bf16, and at full
size against dense cuDNN calls per run of queries with equal keys. A back end that fails either is
not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rcm.core.errors import ConfigError, first_line
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.flash_jvp.budget import relative_error
from rcm.kernels.flash_jvp.selfcheck import time_ms
from rcm.kernels.masked_attention.budget import OUTPUTS, errors_and_budgets, with_gradients
from rcm.kernels.masks import Full, MaskSpec, TeacherForcing
from rcm.nets.attention import BACKENDS as NAMES
from rcm.nets.attention import AttentionCore, attention_record, resolve
from scripts.bench_measure import in_words

HEADS, WIDTH, FRAME_TOKENS, SMALL_TOKENS = 12, 128, 1560, 47
PATTERNS = ("c3-3", "c1-1", "c1-4")
BACKENDS = ("auto", *(name for name in NAMES if name not in ("auto", "reference", "flex")))
TARGETS_MS = {"c3-3 masked": 62.0, "c1-1 masked": 68.0}
"""Milliseconds of forward and backward together."""
AGREEMENT = 8e-3
"""Two independent bf16 results of full size may differ by this much, relative."""


def masks(frames: int) -> dict[str, tuple[MaskSpec, MaskSpec]]:
    """Name -> (full size, small size)."""
    patterns = {name: BlockPattern.parse(name) for name in PATTERNS}
    found: dict[str, tuple[MaskSpec, MaskSpec]] = {
        f"{name} masked": (
            TeacherForcing(pattern, frames, FRAME_TOKENS),
            TeacherForcing(pattern, frames, SMALL_TOKENS),
        )
        for name, pattern in patterns.items()
    }
    length = frames * FRAME_TOKENS
    return found | {"dense": (Full(length, length), Full(987, 987))}


def flop(mask: MaskSpec) -> float:
    """Useful floating-point operations of forward (2 products) and backward (5 products)
    together.
    """
    pairs = sum(
        (s.q_stop - s.q_start) * (stop - start)
        for s in mask.row_segments()
        for start, stop in s.intervals
    )
    return 7 * 2.0 * pairs * WIDTH * HEADS


def draw(mask: MaskSpec, heads: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Random bf16 inputs and an output gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = (mask.q_len, mask.kv_len, mask.kv_len, mask.q_len)
    q, k, v, grad_o = (
        torch.randn(1, n, heads, WIDTH, generator=generator, device="cuda").to(torch.bfloat16)
        for n in lengths
    )
    return (q, k, v), grad_o


def attend_with(core: AttentionCore, mask: MaskSpec) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention through the networks' dispatcher."""
    return lambda q, k, v: core(q, k, v, mask)


def time_backward(
    attend: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad_o: Tensor, *, repeats: int
) -> float:
    """Median milliseconds of the backward pass alone, a fresh graph each time."""
    samples = []
    for _ in range(repeats + 1):
        o = attend(*leaves)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.autograd.grad(o, leaves, grad_o)
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return statistics.median(samples[1:])


def measure(name: str, mask: MaskSpec, small: MaskSpec, *, backend: str, repeats: int) -> dict:
    """One row: errors, then forward without gradient, forward + backward, and backward alone, in
    milliseconds.
    """
    row: dict = {"work": name, "variant": backend}
    try:
        core = AttentionCore(resolve(backend))
    except ConfigError as error:
        return row | {"correct": None, "errors": str(error).partition(": ")[2]}
    began = time.perf_counter()
    inputs, grad_o = draw(small, 2)
    # so that the record of `core` speaks of the full size
    apart_from_large = AttentionCore(resolve(backend))
    report = errors_and_budgets(
        attend_with(apart_from_large, small), inputs, grad_o, mask=small, scale=WIDTH**-0.5
    )
    inputs, grad_o = draw(mask, HEADS)
    attend = attend_with(core, mask)
    got = with_gradients(attend, inputs, grad_o)
    torch.cuda.synchronize()
    row["first_call_s"] = round(time.perf_counter() - began, 1)
    other = with_gradients(attend_with(AttentionCore(resolve("cudnn")), mask), inputs, grad_o)
    apart = {
        output: relative_error(mine, theirs)
        for output, mine, theirs in zip(OUTPUTS, got, other, strict=True)
    }
    row["errors"] = " ".join(
        f"{o} {error:.1e}/{budget:.1e}" for o, (error, budget) in report.items()
    )
    row["full size against dense calls"] = {
        output: float(f"{error:.2g}") for output, error in apart.items()
    }
    row["correct"] = (
        all(error <= budget for error, budget in report.values())
        and max(apart.values()) < AGREEMENT
    )
    if not row["correct"]:
        return row
    del got, other
    leaves = tuple(x.requires_grad_() for x in inputs)
    with torch.no_grad():
        row["forward_ms"] = time_ms(lambda: attend(*leaves), repeats=repeats)
    with torch.enable_grad():
        row["ms"] = time_ms(
            lambda: torch.autograd.grad(attend(*leaves), leaves, grad_o), repeats=repeats
        )
        row["backward_ms"] = time_backward(attend, leaves, grad_o, repeats=repeats)
        o = attend(*leaves)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(o, leaves, grad_o)
        row["backward_peak_GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    row["tflops"] = flop(mask) / row["ms"] / 1e9
    row["chosen"] = attention_record(core)["calls"]
    if name in TARGETS_MS:
        row["target_ms"] = TARGETS_MS[name]
    return row


def measure_all(frames: int, *, only: str, repeats: int) -> list[dict]:
    """Every back end on every mask, printed as they come."""
    rows = []
    for name, (mask, small) in masks(frames).items():
        for backend in BACKENDS:
            if only and only not in f"{name} {backend}":
                continue
            try:
                row = measure(name, mask, small, backend=backend, repeats=repeats)
            except Exception as error:
                row = {"work": name, "variant": backend, "correct": False}
                row["errors"] = first_line(error)
            rows.append(row)
            state = {None: "absent", True: "ok", False: "WRONG"}[row["correct"]]
            rest = in_words(row, without=("work", "variant", "correct"))
            print(f"{row['work']:12s} {row['variant']:12s} {state}  {rest}", flush=True)
    return rows
