"""Runs the kernel of `enter_cache` in Triton's interpreter and prints its largest errors as JSON; a
process of its own.

TRITON_INTERPRET=1 python -m tests.support.interpreted_enter_cache
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from rcm.kernels.fused import enter_cache as kernels
from tests.support import mutants

MUTANTS = {
    "odd channels not turned": ("tl.store(target + 1, (odd * cos + even * sin).to(kind)", "tl.store(target + 1, odd.to(kind)"),
    "keys turned twice": ("        even = turned", "        even = turned * cos - odd * sin"),
    "slots forgotten": ("tl.load(slots_ptr + token) * cache_row", "token * cache_row"),
    "second batch forgotten": ("slot = batch * cache_batch +", "slot ="),
    "mean over half the channels": ("/ WIDTH + eps)", "/ (WIDTH // 2) + eps)"),
    "rows between samples forgotten": ("x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1)", "x.stride(-1) == 1"),
    "angles of one head only": ("pair % (HEAD // 2)", "pair"),
}


def worst(module) -> float:
    """Largest deviation from the formulas over dtypes, strides and key storage."""
    error = 0.0
    # the third: the first rows of longer projections
    for dtype, rotate_keys, strided, rows in (
        (torch.float32, True, False, 5),
        (torch.float16, False, True, 5),
        (torch.float32, False, True, 7),
    ):
        draw = torch.Generator().manual_seed(3)
        wide = torch.randn(2, rows, 3 * 36, generator=draw).to(dtype)[:, :5]
        projected = wide.split(36, dim=2) if strided else tuple(x.contiguous() for x in wide.split(36, dim=2))
        weights = tuple(1 + 0.3 * torch.randn(36, generator=draw).to(dtype) for _ in range(2))
        angle = torch.randn(5, 6, generator=draw)
        slots = torch.tensor([7, 8, 0, 1, 2])
        caches = [torch.zeros(2, 9, 3, 12, dtype=dtype) for _ in range(4)]
        options = {"eps": 1e-6, "rotate_keys": rotate_keys}
        got = module.enter_cache(projected, weights, (angle.cos(), angle.sin()), slots, tuple(caches[:2]), **options)
        expected = kernels.enter_cache_reference(projected, weights, (angle.cos(), angle.sin()), slots, tuple(caches[2:]), **options)
        pairs = ((got, expected), (caches[0], caches[2]), (caches[1], caches[3]))
        scale = 1.0 if dtype == torch.float32 else 1e-2
        error = max(error, *(scale * float((a.float() - b.float()).abs().nan_to_num(9e9).max()) for a, b in pairs))
    return error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        report = {"kernel": worst(kernels), "mutants": {}}
        # one after the other: they share a file, which Triton reads at the first launch
        for name, (old, new) in MUTANTS.items():
            report["mutants"][name] = worst(mutants.load(kernels, old=old, new=new, folder=Path(folder)))
    json.dump(report, sys.stdout)
