"""Where this folder's kernels can be launched."""

from __future__ import annotations

import os

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
