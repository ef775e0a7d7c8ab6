"""Runs the Triton kernels of FP8 attention in the interpreter and prints their errors as JSON; a
process of its own.

TRITON_INTERPRET=1 python -m tests.support.interpreted_fp8_attention errors|mutants
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from rcm.kernels.fp8_attention import codes, coding_kernels, launch, portable, reference
from rcm.kernels.fp8_attention.schedule import PortableTiles
from tests.support import interpreter_casts, mutants

TINY = PortableTiles(16, 16, 4, 1)
MUTANTS = {
    "query scale without that of the keys": (
        coding_kernels,
        "top * (tl.load(key_scale + head) * (scale / 448.0))",
        "top * (scale / 448.0)",
    ),
    "center of the keys forgotten": (coding_kernels, "(x - center[None, :])", "x"),
    "keys in plain order": (coding_kernels, "row = (slot & ~15) + ((slot & 2) << 2) + ((slot & 12) >> 1) + (slot & 1)", "row = slot"),
    "slots forgotten": (coding_kernels, "slot = tl.load(slots_ptr + token, mask=token < length, other=0)", "slot = token"),
    "a last block with a gap taken for a run": (coding_kernels, "(start + BLOCK_L <= length) &", "(start < length) &"),
    "a run begins elsewhere": (coding_kernels, "run = tl.multiple_of(first, 8) +", "run = first // 16 * 8 +"),
    "second batch forgotten": (coding_kernels, "pair = batch * heads + head", "pair = head"),
    "read at the token": (coding_kernels, "(slot if AT_SLOTS else token)", "token"),
    "keys behind the end seen": (portable, "tl.where((key < kv_len)[None, :], s,", "tl.where((key < kv_len + 99)[None, :], s,"),
    "columns taken for tokens": (portable, "(column & ~15) + ((column & 6) << 1) + ((column & 8) >> 2) + (column & 1)", "column"),
    "weights in the order of the product": (portable, "(0, 1, 3, 2, 4)", "(0, 1, 2, 3, 4)"),
    "sum not rescaled": (portable, "total = total * change +", "total = total +"),
    "result not rescaled": (portable, "acc = acc * change[:, None] +", "acc = acc +"),
    "center of the values forgotten": (portable, "* spread[None, :] + center[None, :]", "* spread[None, :]"),
    "parts overlap": (portable, "part * blocks // parts, (part + 1)", "0, (part + 1)"),
}


def deviation(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected; what is not finite counts as infinitely wrong."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else 9e9


def coding_error() -> float:
    """Codes of the kernels against those of the formulas: bytes that differ, and the deviation of
    query scales.
    """
    draw = torch.Generator().manual_seed(1)
    worst = 0.0
    # a run of 32, and others
    run = torch.cat([torch.arange(64, 98), torch.arange(2, 5), torch.arange(8, 56)])
    gap = torch.cat([torch.arange(8, 20), torch.arange(32, 40)])  # 20 slots over a stretch of 32
    for at_slots, dtype, slots in ((False, torch.float32, run), (True, torch.float16, run), (False, torch.float32, gap)):
        k, v = (torch.randn(2, len(slots), 3, 24, generator=draw) + 2 * torch.randn(3, 24, generator=draw) for _ in range(2))
        q = torch.randn(2, 19, 3, 24, generator=draw).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        scales = codes.scales_of(k, v)
        k[0, 3], v[1, 5] = 30 * k[0, 3], -40 * v[1, 5]  # beyond the headroom
        if at_slots:
            k, v = (torch.randn(2, 98, 3, 24, generator=draw).index_copy(1, slots, x) for x in (k, v))
        k, v = k.to(dtype), v.to(dtype)
        mine, plain = (codes.new_codes(scales, batch=2, capacity=98) for _ in range(2))
        launch.write(mine, slots, k, v, at_slots=at_slots)
        codes.write_reference(plain, slots, k, v, at_slots=at_slots)
        asked, expected = launch.code_queries(q, scales, scale=0.2), codes.code_queries_reference(q, scales, scale=0.2)
        bytes_differ = [
            float((a.view(torch.uint8) != b.view(torch.uint8)).float().mean())
            for a, b in ((mine.keys, plain.keys), (mine.values, plain.values), (asked.codes, expected.codes))
        ]
        worst = max(worst, *bytes_differ, deviation(asked.scale, expected.scale))
    return worst


def attention_error() -> float:
    """The Triton kernel against the formula on the same codes; slots behind the keys hold codes,
    too.
    """
    draw = torch.Generator().manual_seed(2)
    worst = 0.0
    for q_len, count, parts, strength in ((21, 53, 1, 1.0), (16, 64, 2, 4.0), (3, 1, 1, 1.0), (40, 39, 3, 1.0)):
        q, k, v = (torch.randn(2, n, 2, 32, generator=draw) for n in (q_len, 80, 80))
        k, v = strength * k + torch.randn(2, 32, generator=draw), v + torch.randn(2, 32, generator=draw)
        held = codes.new_codes(codes.scales_of(k, v), batch=2, capacity=80)
        codes.write_reference(held, torch.arange(80), k, v)
        queries = codes.code_queries_reference(q, held.scales, scale=32**-0.5)
        found = launch.attend_portable(queries, held, count=count, dtype=torch.float32, tiles=TINY, parts=parts)
        worst = max(worst, deviation(found, reference.attend_reference(queries, held, count=count, dtype=torch.float64)))
    return worst


ERRORS = {coding_kernels: coding_error, portable: attention_error}


def mutant_error(module: ModuleType, old: str, new: str, folder: Path) -> float:
    """The error of the module's kernels with `old` replaced by `new`."""
    changed = mutants.load(module, old=old, new=new, folder=folder)
    name = module.__name__.rsplit(".", 1)[1]
    with patch.object(launch, name, changed), patch.dict(globals(), {name: changed}):
        return ERRORS[module]()


if __name__ == "__main__":
    interpreter_casts.install()
    if sys.argv[1] == "errors":
        report = {"coding": coding_error(), "attention": attention_error()}
    else:
        # one after the other: they share a file, which Triton reads at the first launch
        with tempfile.TemporaryDirectory() as folder:
            report = {name: mutant_error(*mutant, Path(folder)) for name, mutant in MUTANTS.items()}
    json.dump(report, sys.stdout)
