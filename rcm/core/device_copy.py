"""Devices: whether one is there, whether its memory ran out, and copies to it for which the host
does not wait.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from rcm.core.errors import ConfigError

_RAN_OUT = re.compile(r"can't allocate memory|out of memory|_STATUS_ALLOC_FAILED")
"""As torch says it of host memory; the driver of pinned memory, graphs, contexts, launches; cuBLAS
and cuDNN. Only torch's own pool of device memory has a class for it.
"""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _RAN_OUT.search(str(error)) is not None


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From the host through pinned memory: a copy from pageable memory lets the
    host wait until the device has done all that its stream was given before, which for a stream of
    video is most of a chunk.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def check_device(device: torch.device | str, *, knob: str = "--device") -> None:
    """`ConfigError` unless tensors can be made on `device`, which `knob` chose."""
    named = f"{knob}{'' if knob.endswith('=') else ' '}{device}"
    if str(device).partition(":")[0] == "meta":
        raise ConfigError(f"{named} has no memory; choose cuda or cpu")
    try:
        torch.empty(0, device=device)
    # what torch raises for a device that is absent, not built in, without kernels, or misspelt
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        told = (str(error).splitlines() or ["it is not known here"])[0]
        raise ConfigError(f"{named} cannot be used: {told}") from error
