"""Dense attention without gradient, mask or tangent by one persistent kernel, on Hopper.

Programs of a grid with a tile of queries each come in rounds, of which the last leaves processors
idle: 4,680 queries of 12 heads are 444 tiles for 132 of them, four rounds for three and a third.
Here every processor has one program with an equal share of all key tiles, wherever that cuts a
tile of queries; what was cut is merged by the log-sum-exps of its parts.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from rcm.kernels.persistent_attention.schedule import Tiles

WIDTH = 128
CAPABILITY = (9, 0)
ALIGNMENT = 16
"""Bytes by which bulk copies want addresses and strides to be divisible."""


def obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot serve queries `q` [B, Lq, N, D] and keys and values [B, Lk, N, D]; None
    if it can.
    """
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != CAPABILITY:
        return "it is for cards of compute capability 9.0 (H100, H200)"
    if q.dtype not in (torch.bfloat16, torch.float16) or {k.dtype, v.dtype} != {q.dtype}:
        return f"it takes bfloat16 or float16, got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] != WIDTH or v.shape[3] != WIDTH:
        return f"it is for heads of {WIDTH} channels, got {q.shape[3]} and {v.shape[3]}"
    if not (q.shape[2] == k.shape[2] == v.shape[2] and q.numel() and k.numel()):
        return "it takes as many heads of keys and values as of queries, and none of them empty"
    if any(not copied_in_bulk(x) for x in (q, k, v)):
        return f"bulk copies take unit last strides, and others of whole {ALIGNMENT} bytes"
    return None if importlib.util.find_spec("triton") else "it needs the package triton"


def copied_in_bulk(x: Tensor) -> bool:
    """Whether bulk copies can read `x` as it lies in memory."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = not any(n % ALIGNMENT for n in (x.data_ptr(), *steps))
    return x.stride(-1) == 1 and all(steps) and aligned


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, tiles: Tiles | None = None) -> Tensor:
    """softmax(scale q k^T) v, [B, Lq, N, D] as `q`, of tensors to which there is no `obstacle`."""
    from rcm.kernels.persistent_attention import launch  # Triton is imported only on CUDA

    exponents = scale * math.log2(math.e), None, None
    return launch.attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), exponents,
        count=k.shape[1], dtype=q.dtype, tiles=tiles or Tiles(),
    )  # fmt: skip
