"""Runs the fused layers in Triton's interpreter and prints their errors as JSON; a process of its
own: it is chosen at import.

TRITON_INTERPRET=1 python -m tests.support.interpreted_fused cases|mutants
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from rcm.kernels.fused import launch, norm_kernels, pointwise_kernels
from rcm.nets.condition import Condition
from rcm.parallel.checkpointing import checkpoint_blocks
from tests.support import mutants
from tests.support.fused_cases import cases, errors
from tests.support.tiny_nets import tiny_net
from tests.support.toy_method import CHANNELS, CONFIG, FRAMES, HEIGHT, LAYOUT, WIDTH

CASES = cases(tokens=5, width=24, odd=7, heads=(9, 3, 16))
NORM, POINTWISE = norm_kernels, pointwise_kernels
MUTANTS = {
    "mean kept": (NORM, "x = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)", "x = x", "affine norm"),
    "padding counted in the variance": (
        NORM,
        "tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)",
        "x - tl.sum(x, axis=0) / WIDTH",
        "modulation shared, odd width",
    ),
    "frame of the gain forgotten": (
        NORM,
        "ptr + batch * stride_b + frame * stride_f + cols",
        "ptr + batch * stride_b + cols",
        "modulation per frame",
    ),
    "batch of the rows forgotten": (
        NORM,
        "ptr + batch * stride_b + frame * stride_f + token",
        "ptr + frame * stride_f + token",
        "rms norm",
    ),
    "last token of a program skipped": (NORM, "tl.minimum(start + ROWS, tokens)", "tl.minimum(start + ROWS - 1, tokens)", "rms norm"),
    "tangent: pull forgotten": (NORM, "(moved - n * (tl.sum(moved * n, axis=0) / WIDTH))", "moved", "rms norm"),
    "tangent: mean forgotten": (
        NORM,
        "moved = tl.where(inside, moved - tl.sum(moved, axis=0) / WIDTH, 0.0)",
        "moved = moved",
        "affine norm",
    ),
    "tangent of the gain forgotten": (NORM, "y_dot += n * factor_dot", "y_dot += 0.0", "modulation per sample"),
    "tangent of the shift forgotten": (NORM, "y_dot += added_dot", "y_dot += 0.0", "modulation per frame"),
    "gradient: pull forgotten": (NORM, "pulled = grad_n - n * (tl.sum(grad_n * n, axis=0) / WIDTH)", "pulled = grad_n", "rms norm"),
    "gradient: mean forgotten": (NORM, "pulled -= tl.sum(grad_n, axis=0) / WIDTH", "pulled -= 0.0", "affine norm"),
    "gradient of the gain not normalised": (NORM, "gain_sum += grad * n", "gain_sum += grad", "rms norm"),
    "gradient of the shift: last token only": (NORM, "shift_sum += grad\n", "shift_sum = grad\n", "affine norm"),
    "gradient: what is carried forgotten": (
        NORM,
        "pulled += _token(carried,",
        "pulled += 0 * _token(carried,",
        "modulation beside its rows",
    ),
    "gelu: columns of the first rows alone": (POINTWISE, "total += slope * grad", "total = slope * grad", "gelu of a product"),
    "gelu: columns of the first block": (
        POINTWISE,
        "cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "cols = tl.arange(0, BLOCK)",
        "gelu of a product",
    ),
    "gate of the value's tangent forgotten": (POINTWISE, "factor * _token(y_dot,", "_token(y_dot,", "gate per frame"),
    "tangent of the gate forgotten": (POINTWISE, "out_dot += factor_dot * value", "out_dot += 0.0", "gate per frame"),
    "gradient of the gate: last token only": (POINTWISE, "gate_sum += grad * ", "gate_sum = grad * ", "gate per frame"),
    "gelu: factor 2 of the sigmoid": (POINTWISE, "tl.exp(-1.5957691216057308", "tl.exp(-0.7978845608028654", "gelu"),
    "gelu: slope of the cubic": (POINTWISE, "0.134145", "0.044715", "gelu"),
    "rotation: sign": (POINTWISE, "even * cos - odd * sin", "even * cos + odd * sin", "rotation"),
    "rotation backwards: sign": (POINTWISE, "sin = -sin", "sin = sin", "rotation"),
    "rotation: heads share the first": (POINTWISE, "rows[:, None] * stride_l + head * stride_n", "rows[:, None] * stride_l", "rotation"),
    "rotation: table of the first tokens": (
        POINTWISE,
        "table = rows[:, None] * (WIDTH // 2)",
        "table = (rows % TOKENS)[:, None] * (WIDTH // 2)",
        "rotation",
    ),
}


def run_cases() -> dict[str, list]:
    """Every output of every case: name, error, budget; and gradients of a network."""
    return {name: list(errors(case, torch.float32)) for name, case in CASES.items()} | {"network": run_network()}


def run_network() -> list[tuple[str, float, float]]:
    """Gradients of a recomputed network with fused layers against plain ones in float64."""
    launch.ROWS_FORWARD, launch.ROWS_BACKWARD, launch.POINTWISE_BLOCK, launch.SUMMED_ROWS = 8, 8, 2048, 64  # few programs
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    text, found = torch.randn(1, 5, CONFIG.text_dim, generator=generator), {}
    for fused, dtype in (("off", torch.float64), ("on", torch.float32)):
        net = tiny_net(dtype=dtype, attention="reference", **asdict(CONFIG) | {"num_layers": 1})
        net.set_fused(fused)
        checkpoint_blocks(net, mode="block_wise_keep_attention_mlp")
        net(x.to(dtype), torch.full((1, 1), 300.0, dtype=dtype), Condition(text.to(dtype)), LAYOUT).square().mean().backward()
        found[fused] = {name: p.grad.double() for name, p in net.named_parameters()}
    return [(name, float((found["on"][name] - g).norm() / g.norm()), 2e-5) for name, g in found["off"].items()]


def run_mutants() -> dict[str, bool]:
    """Whether each broken kernel exceeds its budget on the case named for it."""
    caught = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (module, old, new, case) in MUTANTS.items():
            broken = mutants.load(module, old=old, new=new, folder=Path(folder))
            launch.norm_kernels, launch.pointwise_kernels = (broken, POINTWISE) if module is NORM else (NORM, broken)
            caught[name] = not all(error <= budget for _, error, budget in errors(CASES[case], torch.float32))
    return caught


if __name__ == "__main__":
    launch.ROWS_FORWARD, launch.ROWS_BACKWARD, launch.TABLE_ELEMENTS, launch.POINTWISE_BLOCK = 2, 3, 32, 64
    launch.SUMMED_ROWS, launch.SUMMED_BLOCK = 3, 16
    # which fills fresh memory with NaN: elements that no program writes are noticed
    torch.use_deterministic_algorithms(True)
    json.dump({"cases": run_cases, "mutants": run_mutants}[sys.argv[1]](), sys.stdout)
