"""How many threads a process computes with on a CPU."""

from __future__ import annotations

import os

import torch
from torch import nn

TOY_PARAMETERS = 20_000_000
"""A network with fewer is a toy: its tensors are too small to share among threads, which on a busy
machine then wait for each other.
"""
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def settle_threads(net: nn.Module, *, device: torch.device | str) -> None:
    """One thread for a toy network on a CPU, unless the environment says how many. Others keep
    torch's choice.
    """
    told = any(os.environ.get(name) for name in ENVIRONMENT)
    if (
        torch.device(device).type == "cpu"
        and not told
        and sum(p.numel() for p in net.parameters()) < TOY_PARAMETERS
    ):
        torch.set_num_threads(1)
