"""What launches of Triton kernels share."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Types of tensors that kernels read and write."""


def runs_on(x: Tensor) -> bool:
    """Whether kernels can be launched for `x`: on CUDA, or in Triton's interpreter, outside
    compiled code.
    """
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and not torch.compiler.is_compiling()


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` current where it is not: launches go to the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """`x`, or a copy where its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_2(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()
