"""Devices: whether one is there, and copies to it for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.core.errors import ConfigError


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
