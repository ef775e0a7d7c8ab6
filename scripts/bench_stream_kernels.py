"""Kernels of a captured pass, each timed alone: attention in parts and by the persistent kernel,
this package's masked attention, products joined and apart. Parts of `scripts.bench_stream`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rcm.kernels.flash_jvp.api import flash_jvp
from rcm.kernels.fused.api import gelu_tanh
from rcm.kernels.persistent_attention import api as persistent
from rcm.kernels.split_attention.api import num_splits, split_attention
from rcm.nets.denoiser import Denoiser
from scripts.bench_measure import CheckFailed, alone, captured, relative


def attention_in_parts(denoiser: Denoiser) -> dict[str, Any]:
    """Milliseconds of one dense attention call in a captured graph by number of parts, and by the
    persistent kernel with its error against one library call; the number that the rule chooses.
    """
    rows, heads = {}, denoiser.net.config.num_heads
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for own, past in (
        (4680, 0),
        (4680, 4680),
        (4680, 14040),
        (4680, 28080),
        (1560, 0),
        (1560, 3120),
        (1560, 14040),
        (1560, 31200),
    ):
        q, k, v = (
            torch.randn(1, n, heads, 128, device="cuda", dtype=torch.bfloat16)
            for n in (own, own + past, own + past)
        )
        row: dict[str, Any] = {"chosen": num_splits(own, own + past, heads, processors)}
        calls = {
            f"{parts}": partial(split_attention, q, k, v, scale=128**-0.5, parts=parts)
            for parts in range(1, 7)
        }
        if persistent.obstacle(q, k, v) is None:
            calls["persistent"] = partial(persistent.attend, q, k, v, scale=128**-0.5)
            row["error"] = relative(calls["persistent"](), calls["1"]())
            if row["error"] > 1e-2:
                raise CheckFailed(f"{own} x {own + past}: the persistent kernel is off by {row}")
        row |= {name: round(captured(call, fill_ms=4), 4) for name, call in calls.items()}
        rows[f"{own} x {own + past}"] = row
    return rows


def own_attention(denoiser: Denoiser) -> dict[str, Any]:
    """Milliseconds of this package's forward beside cuDNN's, of three products and one, and of a
    product with its GELU apart and in one.
    """
    rows, heads = {}, denoiser.net.config.num_heads
    for own, keys in ((4680, 32760), (4680, 16380), (1560, 32760), (32760, 32760)):
        q, k, v = (
            torch.randn(1, n, heads, 128, device="cuda", dtype=torch.bfloat16)
            for n in (own, keys, keys)
        )
        rows[f"{own} x {keys}"] = {
            "own": alone(
                lambda q=q, k=k, v=v: flash_jvp(
                    q, k, v, None, None, None, mask=None, implementation="triton"
                ),
                repeats=3,
            ),
            "cudnn": alone(partial(split_attention, q, k, v, scale=128**-0.5, parts=1), repeats=3),
        }
    for tokens in (1560, 4680):
        x, w, b = (
            torch.randn(*s, device="cuda", dtype=torch.bfloat16)
            for s in ((tokens, 1536), (8960, 1536), (8960,))
        )
        apart = alone(lambda x=x, w=w, b=b: gelu_tanh(F.linear(x, w, b)), repeats=3)
        joined = alone(
            lambda x=x, w=w, b=b: torch._addmm_activation(b, x, w.t(), use_gelu=True), repeats=3
        )
        exact = F.gelu(F.linear(x.double(), w.double(), b.double()), approximate="tanh")
        both = gelu_tanh(F.linear(x, w, b)), torch._addmm_activation(b, x, w.t(), use_gelu=True)
        errors = [float((y.double() - exact).norm() / exact.norm()) for y in both]
        product = alone(lambda x=x, w=w, b=b: F.linear(x, w, b), repeats=3)
        parts = [(y, c) for y, c in zip(w[:4608].split(1536), b[:4608].split(1536), strict=True)]
        three = alone(lambda x=x, parts=parts: [F.linear(x, y, c) for y, c in parts], repeats=3)
        rows[f"q, k, v {tokens}"] = {
            "three": three,
            "one": alone(lambda x=x, w=w, b=b: F.linear(x, w[:4608], b[:4608]), repeats=3),
        }
        rows[f"gelu {tokens}"] = {
            "apart": apart,
            "in one": joined,
            "errors": errors,
            "product": product,
        }
    return rows
