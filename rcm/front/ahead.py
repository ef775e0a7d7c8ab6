"""`rcm doctor --compile HxW`: the kernels of streams of Wan's networks, compiled before one is
opened. What Triton compiles it keeps on disk, so processes that start later find it.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from functools import partial

import torch

from rcm.encoders.wan_vae_compile import compile_decoder
from rcm.kernels.precompile import Compiled, precompile
from rcm.nets.wan.config import preset

SIDES = range(16, 8193, 16)
"""Wan's patches are two cells of an 8-fold smaller latent."""
NETWORKS = ("1.3B", "14B")
HOPPER = (9, 0)


def frame_size(text: str) -> tuple[int, int]:
    """(H, W) of "HxW"; `argparse.ArgumentTypeError` for others than Wan's."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(x.isascii() and x.isdecimal() and int(x) in SIDES for x in sides):
        raise ArgumentTypeError(
            f"{text!r} is not HxW with sides that are multiples of {SIDES.step}, at most"
            f" {SIDES[-1]}, such as 480x832"
        )
    return int(sides[0]), int(sides[1])


def compiled(device: torch.device, size: tuple[int, int]) -> Iterator[tuple[str, Compiled]]:
    """Compile for a CUDA `device`, one part after the other: what it is, how many kernels, and
    seconds. Networks and decoder in bfloat16.
    """
    plans: dict[str, Callable[[], Compiled]] = {
        "decoder": partial(compile_decoder, device, size=size)
    }
    for name in NETWORKS:
        plans[f"{name} layers"] = partial(_layers, device, name)
    if torch.cuda.get_device_capability(device) == HOPPER:
        plans |= {
            "attention": partial(_attention, device),
            "FP8 attention": partial(_coded, device),
        }
    for name, plan in plans.items():
        yield name, plan()


# Triton is imported only on CUDA
def _layers(device: torch.device, name: str) -> Compiled:
    from rcm.kernels.fused.compile_list import inference_plan

    net = preset(name)
    plan = inference_plan(width=net.dim, hidden=net.ffn_dim, heads=net.num_heads, eps=net.eps)
    return precompile(plan, device=device)


def _attention(device: torch.device) -> Compiled:
    from rcm.kernels.persistent_attention.compile_list import attention_plan

    return precompile(attention_plan, device=device)


def _coded(device: torch.device) -> Compiled:
    from rcm.kernels.fp8_attention.compile_list import attention_plan

    return precompile(attention_plan, device=device)
