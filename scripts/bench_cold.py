"""Parts of `scripts.bench_cheaper` that time a start with nothing compiled."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch

DEVICE = "cuda"
WIDTH, HIDDEN, HEADS = 1536, 8960, 12
SIZE = (480, 832)


def kernels_cold() -> dict[str, Any]:
    """Seconds to compile the transformer's fused and quantised layers with an empty cache, side by
    side in threads.
    """
    return compiled_cold(threads=None)


def kernels_cold_serial() -> dict[str, Any]:
    """The same kernels one by one."""
    return compiled_cold(threads=1)


def compiled_cold(*, threads: int | None) -> dict[str, Any]:
    """Kernels and seconds; the process must not have compiled any of them."""
    from rcm.kernels.fused.compile_list import inference_plan
    from rcm.kernels.precompile import default_threads, precompile

    torch.zeros(1, device=DEVICE)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        plan = inference_plan(width=WIDTH, hidden=HIDDEN, heads=HEADS, fp8=True)
        done = precompile(plan, device=DEVICE, threads=threads)
    threads = threads or default_threads()
    print(f"  {done.kernels} kernels in {done.seconds:.2f} s, {threads} at once", flush=True)
    return {"kernels": done.kernels, "seconds": done.seconds, "threads": threads}


def vae_cold() -> dict[str, Any]:
    """Fresh processes up to three decoded latent frames, with an empty and a filled cache."""
    from scripts.bench_vae import cold_starts, show_cold

    found = cold_starts(height=SIZE[0], width=SIZE[1])
    show_cold(found)
    return found
