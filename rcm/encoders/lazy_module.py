"""A frozen network that is built when it is first needed, moved, and freed for good."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Self

import torch
from torch import nn


class LazyModule:
    """Holds the network of `build(device)` from the first `load()` to `unload()`."""

    def __init__(
        self, build: Callable[[torch.device], nn.Module], *, device: torch.device | str
    ) -> None:
        self._build = build
        self._device = torch.device(device)
        self._module: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is, or will be built."""
        return self._device

    @property
    def is_loaded(self) -> bool:
        return self._module is not None

    def load(self) -> nn.Module:
        """The network on `device`, built now if need be."""
        if self._module is None:
            self._module = self._build(self._device)
        return self._module

    def unload(self) -> None:
        """Drop the network and give its memory back to the device, not only to torch."""
        self._module = None
        self._release()

    def to(self, device: torch.device | str) -> Self:
        """Use `device` from now on; a loaded network moves without a copy, or is freed."""
        target, left = torch.device(device), self._device
        if self._module is not None:
            try:
                self._module.to(target)
            except BaseException:
                self.unload()  # half of it has moved
                raise
        self._device = target
        if target != left:
            self._release()
        return self

    def _release(self) -> None:
        # a module in a reference cycle (hooks make them) would keep its storages until some later
        # collection
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
