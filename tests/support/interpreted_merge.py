"""Runs the kernel of `split_attention` in Triton's interpreter and prints its largest errors as
JSON; a process of its own.

TRITON_INTERPRET=1 python -m tests.support.interpreted_merge
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from rcm.kernels.split_attention import merge_kernel
from rcm.kernels.split_attention.api import merge_reference
from tests.support import mutants

MUTANTS = {
    "last part forgotten": ("tl.static_range(0, PARTS)", "tl.static_range(0, PARTS - 1)"),
    "weights not normalised": ("total / weights[:, None]", "total"),
    "smallest instead of largest": ("top = tl.maximum(top,", "top = tl.minimum(top,"),
    "heads and rows swapped": ("(batch * length + row)[:, None] * heads + head", "(batch * heads + head) * length + row[:, None]"),
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        report = {"kernel": worst(merge_kernel), "mutants": {}}
        # one after the other: they share a file, which Triton reads at the first launch
        for name, (old, new) in MUTANTS.items():
            report["mutants"][name] = worst(mutants.load(merge_kernel, old=old, new=new, folder=Path(folder)))
    json.dump(report, sys.stdout)
