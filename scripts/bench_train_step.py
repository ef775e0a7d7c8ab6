"""One training step of the TF-sCM student, and one bidirectional forward against its floor:
correctness first, then times and memory.

    python -m scripts.bench_train_step [--net 1.3B|14B] [--layers N] [--frames 21] [--pattern \\
        c3-3 --pattern c1-1]
                                       [--recompute block_wise --recompute block_wise+1 ...]
                                       [--linear-precision compute --linear-precision fp8]
                                       [--fused auto|off] [--lora RANK]
                                       [--frozen-weights compute|fp8_storage|fp8]
                                       [--json FILE]

The student and its passes are those of `scripts.bench_train_student`: tangent pass = the clean half
into the context cache, then the noisy half with tangents over it; gradient pass = packed [clean;
noisy] forward and backward.

The floor of the forward is the sum over the network's own matrix products, each timed alone at its
shape, plus its attention calls, each timed alone: medians of calls in a row, times how often the
forward makes them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from rcm.core.arguments import one_of
from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.inference.outcome import command
from rcm.nets.condition import Condition
from rcm.nets.frozen_fp8 import FrozenWeights
from rcm.nets.layout import TokenLayout
from rcm.nets.trained_fp8 import LinearPrecision
from rcm.nets.wan.config import WanConfig, preset
from rcm.parallel.fsdp import stored_parameters
from rcm.parallel.mesh import process_group
from scripts.bench_measure import (
    CheckFailed,
    bench_flags,
    breakdown,
    floor_of,
    in_words,
    relative,
    this_card,
    timed,
    write,
)
from scripts.bench_train_student import HEIGHT, WIDTH, Step, build, exact_student, recomputed


def bench_step(config: WanConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every pass of the student step, for every pattern; the first row holds the seconds of the
    very first step. With `--only gradient` the gradient pass alone, its tangent noise: what a step
    of teacher-forced diffusion is.
    """
    student = build(config, options, frozen=False)
    rows: list[dict[str, Any]] = []
    for name in options.pattern:
        step = Step(student, BlockPattern.parse(name), frames=options.frames)

        def measure(
            work: str,
            call: Callable[[], object],
            *,
            traced: bool = False,
            name: str = name,
            step: Step = step,
        ) -> None:
            row = {"work": f"{name} {work}"} | told_of(options)
            row |= timed(call, repeats=options.repeats, prepare=step.forget)
            report(rows, row | (breakdown(call) if traced and options.profile else {}))

        if options.only == "gradient":
            measure("gradient pass", partial(step.gradient_pass, step.v_teacher), traced=True)
            step.forget()
            continue
        begin = time.perf_counter()
        step.whole()
        torch.cuda.synchronize()
        report(rows, {"work": f"{name} first step", "ms": 1e3 * (time.perf_counter() - begin)})
        measure("context pass", step.context_pass, traced=True)
        v_dot = bench_noisy(step, measure)
        measure("tangent pass (both)", step.tangent_pass)
        measure("packed forward without gradient", step.packed_forward)
        measure("gradient pass", partial(step.gradient_pass, v_dot), traced=True)
        measure("step (tangent + gradient)", step.whole)
        step.forget()
    return rows


def bench_noisy(step: Step, measure: Callable[..., None]) -> Tensor:
    """Measure the noisy pass over a cache that dies here, and return its tangent."""
    cache = step.context_pass()
    measure("noisy pass with tangents", partial(step.noisy_pass, cache), traced=True)
    return step.noisy_pass(cache)[1]


@torch.no_grad()
def bench_forward(config: WanConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One bidirectional forward and its floor, alternating, in one run."""
    denoiser = build(config, changed(options, recompute="none"), frozen=True).eval_params()
    layout = TokenLayout.bidirectional(options.frames, grid=denoiser.token_grid(HEIGHT, WIDTH))
    x = torch.randn(1, config.out_dim, options.frames, HEIGHT, WIDTH, device="cuda")
    cond = Condition(torch.randn(1, config.text_len, config.text_dim, device="cuda"))
    t = torch.full((1, 1), 0.6, dtype=torch.float64, device="cuda")

    def call() -> Tensor:
        return denoiser.velocity(x, t, cond, layout)

    rows: list[dict[str, Any]] = []
    weights = options.frozen_weights
    told = "" if weights == "compute" else f", frozen weights {weights}"
    row = {"work": f"bidirectional forward, {layout.num_tokens} tokens{told}"}
    row |= timed(call, repeats=options.repeats)
    if told:  # the floor is that of plain products
        report(rows, row)
        return rows
    floor = floor_of(denoiser.net, call, repeats=options.repeats)
    for part in floor["parts"]:
        count, ms = part["count"], part["ms"]
        print(f"    {count:4d} x {ms:8.3f} ms = {count * ms:8.2f} ms  {part['what']}", flush=True)
    row["ms"] = statistics.median([row["ms"], timed(call, repeats=options.repeats)["ms"]])
    row |= floor | {"over_floor": row["ms"] / floor["floor_ms"]}
    report(rows, row | (breakdown(call) if options.profile else {}))
    return rows


def told_of(options: argparse.Namespace) -> dict[str, str]:
    """What tells rows of the same work apart."""
    return {"recompute": options.recompute, "linear_precision": options.linear_precision}


def changed(options: argparse.Namespace, **changes: object) -> argparse.Namespace:
    """A copy with changes."""
    return argparse.Namespace(**{**vars(options), **changes})


def check(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A small network in bfloat16, fused and plain, against itself in float64: value, tangent,
    gradients; relative L2 errors.
    """
    config = WanConfig(dim=256, ffn_dim=704, num_heads=4, num_layers=3, text_dim=64, text_len=24)
    rows: list[dict[str, Any]] = []
    truth: dict[str, Tensor] = {}
    for name, fused in (("float64", None), ("plain", "off"), ("fused", "on")):
        plain = changed(options, fused=fused, compile=False)
        exact = partial(exact_student, config, rank=options.lora)
        student = exact() if fused is None else build(config, plain, frozen=False)
        step = Step(student, BlockPattern(3, 3), frames=6)
        found = {"tangent": step.tangent_pass()[1]}
        v = step.forcing.velocity(student, step.x_t, step.t, step.cond, context=step.context)
        (v * step.v_teacher).sum().backward()
        found["value"], held = v.detach(), stored_parameters(student.net)
        found |= {f"gradient {key}": full(p.grad) for key, p in held.items()}
        if name == "float64":
            truth = found
            continue
        errors = {key: relative(x, truth[key]) for key, x in found.items()}
        gradients = [error for key, error in errors.items() if key.startswith("gradient")]
        row = {
            "work": f"check: {name} layers in bf16 against float64",
            **told_of(options),
            "value": errors["value"],
            "tangent": errors["tangent"],
            "gradients_worst": max(gradients),
            "gradients_median": statistics.median(gradients),
        }
        report(rows, row)
    plain, fused_row = rows
    for key in ("value", "tangent", "gradients_worst", "gradients_median"):
        if not fused_row[key] <= 1.5 * plain[key] + 1e-3:
            raise CheckFailed(
                f"the fused layers are wrong: {key} error {fused_row[key]:.2e}, plain layers"
                f" {plain[key]:.2e}"
            )
    return rows


def full(x: Tensor) -> Tensor:
    """A tensor whole."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def report(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Keep and print a row."""
    rows.append(row)
    shown = in_words(row, without=("work", "parts", "largest_others"))
    print(f"{row['work']:48s} {shown}", flush=True)
    for name, spent, count in row.get("largest_others", ()):
        print(f"        {spent:8.2f} ms in {count:5d}  {name[:140]}", flush=True)


@command
def main(arguments: list[str] | None = None) -> int:
    """Check, measure, print, write."""
    parser = bench_flags(__doc__)
    add = parser.add_argument
    add("--net", default="1.3B", choices=("1.3B", "14B"))
    add("--layers", type=int, help="fewer blocks than the network has")
    add("--frames", type=int, default=21, help="latent frames of 1560 tokens")
    add("--pattern", action="append", help="blocks of the student step; repeatable (c3-3 and c1-1)")
    how = "of blocks: MODE, MODE/EVERY or MODE+LAST_KEPT; repeatable (block_wise)"
    add("--recompute", action="append", help=how)
    how = "products of the student, as model.config.net.linear_precision; repeatable (compute)"
    add("--linear-precision", action="append", choices=get_args(LinearPrecision), help=how)
    add("--attention", default="auto", help="attention back end")
    add("--fused", default="auto", choices=("auto", "on", "off"))
    add("--lora", type=int, default=0, metavar="RANK", help="train adapters on a frozen student")
    how = "how the network of --only forward keeps its weights, as model.config.frozen_weights"
    add("--frozen-weights", default="compute", choices=get_args(FrozenWeights), help=how)
    add("--compile", action="store_true", help="compile the student's blocks")
    add("--only", default="all", choices=("all", "check", "step", "gradient", "forward"))
    add("--repeats", type=int, default=3)
    add("--profile", action="store_true", help="break passes down by kind of kernel")
    student = ("pattern", "recompute", "linear_precision", "lora")
    parser.idle(*student, beside="only", when=one_of("only", "forward"))
    parser.idle("frozen_weights", beside="only", when=one_of("only", "check", "step", "gradient"))
    checked = ("net", "layers", "frames", "pattern", "compile", "repeats", "profile")
    parser.idle(*checked, beside="only", when=one_of("only", "check"))
    options = parser.parse_args(arguments)
    found = this_card("bench_train_step") | {"options": vars(options)}
    options.pattern = options.pattern or ["c3-3", "c1-1"]
    ways = product(options.recompute or ["block_wise"], options.linear_precision or ["compute"])
    variants = [changed(options, recompute=mode, linear_precision=how) for mode, how in ways]
    for variant in variants:  # refused before anything is built
        recomputed(variant.recompute)
    for pattern in options.pattern if options.only != "forward" else ():
        BlockPattern.parse(pattern).num_blocks(options.frames)
    config = preset(options.net)
    if options.layers is not None:
        if options.layers > config.num_layers:
            raise ConfigError(f"--layers {options.layers}: {options.net} has {config.num_layers}")
        config = replace(config, num_layers=options.layers)
    parts: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []
    for chosen in variants:
        parts.append(("check", partial(check, chosen)))
        step = "gradient" if options.only == "gradient" else "step"
        parts.append((step, partial(bench_step, config, chosen)))
    parts.append(("forward", partial(bench_forward, config, options)))
    with process_group("cuda"):
        rows = [row for name, part in parts if options.only in ("all", name) for row in part()]
    if options.json:
        write(options.json, {"machine": found, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
