"""Runs the kernel of `deposit` in Triton's interpreter and prints its largest errors as JSON; a
process of its own.

TRITON_INTERPRET=1 python -m tests.support.interpreted_deposit
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from rcm.kernels.masked_attention import deposit_kernel
from rcm.kernels.masked_attention.deposit import deposit
from tests.support import mutants

CASES = {
    "one run": {"count": 1, "length": 7, "start": 3, "step": 0},
    "comb": {"count": 3, "length": 2, "start": 1, "step": 5},
    "longer than a block": {"count": 2, "length": 9, "start": 0, "step": 10, "width": 1024},
}
MUTANTS = {
    "start forgotten": ("target + first + run", "target + run"),
    "runs on top of each other": ("run * stride", "0 * stride"),
    "parts read as one": ("part + run * length + inside", "part + inside"),
    "end not guarded": ("keep = inside < length", "keep = inside < length + 1"),
    "never adds": ("if ADD:", "if False:"),
}


def worst(module, name: str) -> float:
    """Largest deviation from torch over dtypes and both modes."""
    case = {"width": 6, **CASES[name]}
    error = 0.0
    for wide, narrow in ((torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float32)):
        for add in (False, True):
            generator = torch.Generator().manual_seed(0)
            target = torch.randn(24, 2, case["width"], generator=generator).to(wide)
            part = torch.randn(case["count"], case["length"], 2, case["width"], generator=generator).to(narrow)
            expected = target.clone()
            deposit(expected, part, start=case["start"], step=case["step"], add=add)
            module.launch_deposit(target, part, start=case["start"], step=case["step"], add=add)
            error = max(error, float((target.float() - expected.float()).abs().max()))
    return error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        broken = {name: mutants.load(deposit_kernel, old=old, new=new, folder=Path(folder)) for name, (old, new) in MUTANTS.items()}
        report = {
            "cases": {name: worst(deposit_kernel, name) for name in CASES},
            "mutants": {name: max(worst(module, case) for case in ("one run", "comb")) for name, module in broken.items()},
        }
    json.dump(report, sys.stdout)
