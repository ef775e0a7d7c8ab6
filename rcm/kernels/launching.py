"""What launches of Triton kernels share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` current where it is not: launches go to the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def power_of_2(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()
