"""Peak memory of CPU tensors, counted: what `torch.cuda.max_memory_allocated` would say of the same
allocations, for machines without CUDA.

Every operator that the dispatcher sees reports its outputs; a storage counts from its birth until
it is freed or resized. Python-side gradient bookkeeping is not memory. Works under FSDP2, which
resizes storages behind the dispatcher's back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryTrace(TorchDispatchMode):
    """While active, counts the bytes of all live tensor storages that it has seen.

    `current`, `peak` in bytes; `reset_peak` starts a new maximum at the present level. `known`:
    tensors that exist already and count from the start.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref] = {}
        for tensor in known:
            self._see(tensor)

    def reset_peak(self) -> None:
        """Forget the maximum so far."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what came out."""
        out = func(*args, **(kwargs or {}))
        for item in tree_iter(out):
            if isinstance(item, Tensor):
                self._see(item)
        return out

    @contextmanager
    def watching(self) -> Iterator[MemoryTrace]:
        """Active within the block, resizes of storages included."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if id(storage) in self._sizes:
                self._set(id(storage), storage.nbytes())
            return result

        type.__setattr__(torch.UntypedStorage, "resize_", resize)
        try:
            with self:
                yield self
        finally:
            type.__setattr__(torch.UntypedStorage, "resize_", original)

    def _see(self, tensor: Tensor) -> None:
        if hasattr(tensor, "_local_tensor"):
            tensor = tensor._local_tensor
        if tensor.device.type not in ("cpu", "meta") or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = 0
            self._alive[key] = weakref.ref(storage, partial(self._forget, key))
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.current += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int, _: object) -> None:
        self.current -= self._sizes.pop(key, 0)
        self._alive.pop(key, None)
