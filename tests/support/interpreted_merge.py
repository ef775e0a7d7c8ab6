"""Runs the kernels that merge parts, of `split_attention` and of `persistent_attention`, in
Triton's interpreter and prints their largest errors as JSON; a process of its own.

TRITON_INTERPRET=1 python -m tests.support.interpreted_merge
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import torch

from rcm.kernels.persistent_attention import merge_kernel as persistent
from rcm.kernels.persistent_attention.schedule import Tiles, make_plan
from rcm.kernels.split_attention import merge_kernel
from rcm.kernels.split_attention.api import merge_reference
from tests.support import mutants
from tests.support.persistent_jobs import jobs

MUTANTS = {
    "last part forgotten": ("tl.static_range(0, PARTS)", "tl.static_range(0, PARTS - 1)"),
    "weights not normalised": ("total / weights[:, None]", "total"),
    "smallest instead of largest": ("top = tl.maximum(top,", "top = tl.minimum(top,"),
    "heads and rows swapped": ("(batch * length + row)[:, None] * heads + head", "(batch * heads + head) * length + row[:, None]"),
}
PERSISTENT_MUTANTS = {
    "parts weighed alike": ("tl.exp2(top - raised), tl.exp2(lse - raised)", "tl.exp2(lse - lse), tl.exp2(lse - lse)"),
    "first part of a program only": ("second = start // blocks != index", "second = start < 0"),
    "last owner left out": ("range(first, last + 1)", "range(first, last)"),
}


def worst(module) -> float:
    """Largest deviation from the formula over parts, lengths and scales of the log-sum-exps."""
    error = 0.0
    for parts, length, width, scale in ((2, 5, 16, 1.0), (3, 33, 24, 1.0), (6, 40, 16, 90.0)):
        draw = torch.Generator().manual_seed(parts)
        # strides of what cuDNN returns: heads in front, memory in the order of tokens
        outputs = [torch.randn(2, length, 3, width, generator=draw).transpose(1, 2) for _ in range(parts)]
        lses = [scale * torch.randn(2, 3, length, generator=draw) for _ in range(parts)]
        error = max(error, float((module.merge(outputs, lses) - merge_reference(outputs, lses)).abs().nan_to_num(9e9).max()))
    return error


def worst_persistent(module) -> float:
    """Parts as the persistent kernel leaves them, made in torch, against whole attention; every
    tile must be somebody's.
    """
    draw = torch.Generator().manual_seed(3)
    worst, q_len, kv_len, pairs, block, width = 0.0, 300, 100, 2, 16, 16
    for programs in (5, 11, 60):
        tiles = Tiles(2, block)
        plan = make_plan(q_len=q_len, kv_len=kv_len, pairs=pairs, tiles=tiles, programs=programs)
        scores = 3 * torch.randn(pairs, plan.tiles_per_head * tiles.rows, plan.blocks * block, generator=draw)
        scores[..., kv_len:] = float("-inf")
        values = torch.randn(pairs, plan.blocks * block, width, generator=draw)
        out = torch.full((1, q_len, pairs, width), float("nan"))
        part_o, part_lse = torch.full((2 * programs, tiles.rows, width), float("nan")), torch.full((2 * programs, tiles.rows), float("nan"))
        for program in range(programs):
            for index, tile, low, high in jobs(plan, programs, program):
                pair, row = tile // plan.tiles_per_head, tile % plan.tiles_per_head * tiles.rows
                logits = scores[pair, row : row + tiles.rows, low * block : high * block]
                found = logits.softmax(dim=-1) @ values[pair, low * block : high * block]
                if (low, high) == (0, plan.blocks):
                    out[0, row : row + tiles.rows, pair] = found[: q_len - row]
                else:
                    part = 2 * program + (index > plan.whole)
                    part_o[part], part_lse[part] = found, logits.logsumexp(dim=-1) / math.log(2)
        if plan.remaining:
            module.merge_parts[(plan.remaining, tiles.rows // 32)](
                part_o, part_lse, out, plan.whole * programs,
                plan.remaining, plan.blocks, plan.sharers, pairs, plan.tiles_per_head, q_len, *out.stride()[:3],
                TILE=tiles.rows, ROWS=32, WIDTH=width,
            )  # fmt: skip
        expected = (scores.softmax(dim=-1) @ values)[:, :q_len].transpose(0, 1)
        worst = max(worst, float((out[0] - expected).norm().nan_to_num(9e9) / expected.norm()))
    return worst


def checked(module, check, broken: dict[str, tuple[str, str]], folder: Path) -> dict:
    """Errors of a kernel and of its mutants, one after the other: they share a file, which Triton
    reads at the first launch.
    """
    return {
        "kernel": check(module),
        "mutants": {name: check(mutants.load(module, old=old, new=new, folder=folder)) for name, (old, new) in broken.items()},
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name in ("split", "persistent"):
            Path(folder, name).mkdir()
        report = {
            "split": checked(merge_kernel, worst, MUTANTS, Path(folder, "split")),
            "persistent": checked(persistent, worst_persistent, PERSISTENT_MUTANTS, Path(folder, "persistent")),
        }
    json.dump(report, sys.stdout)
