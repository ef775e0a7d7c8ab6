"""Copies from host to device for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From the host through pinned memory: a copy from pageable memory lets the
    host wait until the device has done all that its stream was given before, which for a stream of
    video is most of a chunk.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
