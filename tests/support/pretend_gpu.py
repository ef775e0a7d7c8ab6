"""A Triton driver without a GPU: compiles for compute capability 9.0, and notes which kernels are
loaded instead of loading them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

TARGET = GPUTarget("cuda", 90, 32)
DEVICES = itertools.count(77)
"""Of no machine, one per scope: what is compiled for it is never mistaken for the kernels of a card
that is there, nor for those of another test.
"""


@contextmanager
def pretended() -> Iterator[list[str]]:
    """Scope in which the current device is a Hopper card; gives the names of the kernels loaded on
    it, in the order of loading.
    """
    loaded: list[str] = []
    device = next(DEVICES)

    def note(kernel: CompiledKernel) -> None:
        loaded.append(kernel.name)

    active = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: TARGET,
    )
    with (
        patch.object(driver, "_active", active),
        patch.object(torch.cuda, "device", lambda _: nullcontext()),
        patch.object(torch.cuda, "set_device", lambda _: None),
        patch.object(torch.cuda, "current_device", lambda: device),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(CompiledKernel, "run", property(note)),
    ):
        yield loaded
