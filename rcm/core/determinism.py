"""Sums in a fixed order on a GPU, so that two runs are equal bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Within the context torch takes deterministic algorithms alone; nothing changes where that is
    not `wanted`. To be entered before the process computes on a GPU: cuBLAS reads its workspace's
    setting then. RuntimeError from an operation that has no such algorithm, naming it.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module whose attribute is a property
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # every buffer is written before it is read here; filling them costs a pass each
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        memory.fill_uninitialized_memory = fill
