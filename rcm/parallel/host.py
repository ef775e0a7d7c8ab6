"""Host memory as a place for what the device does not need for now: weights of a network that waits
there, and tensors that live there and pass through the device.

On CUDA the host's memory is pinned, and copies run on streams of their own, ordered by events; on
other devices the same steps are plain copies, so that numbers are those of a run without them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import TensorMeta

from rcm.core.errors import ConfigError
from rcm.parallel.blocks import blocks_of

PAGE = 4096
REGISTERED = 1 << 20
"""Bytes from which pinned memory is registered for itself."""


def host_memory(size: int, *, pinned: bool) -> Tensor:
    """`size` bytes of host memory, uint8, undefined; pinned for copies to CUDA.

    Torch hands pinned memory out in powers of two, which is half as much again for the sizes of
    Wan's weights. Here large pieces are plain memory that is registered with the driver, to the
    page. `ConfigError` where there is too little.
    """
    if not pinned or size < REGISTERED:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    # whole pages: what shares a page with another registered piece could not be registered
    try:
        held = np.empty(-(-size // PAGE) * PAGE + PAGE, np.uint8)
    except MemoryError as error:
        raise _too_little(size, "out of memory") from error
    start = -held.ctypes.data % PAGE
    address, length = held.ctypes.data + start, len(held) - PAGE
    _register(address, length)
    # not at exit, when the driver may be gone and gives all back itself
    weakref.finalize(held, _unregister, address).atexit = False
    return torch.from_numpy(held[start : start + size])


def _register(address: int, length: int) -> None:
    problem = torch.cuda.cudart().cudaHostRegister(address, length, 0)
    if int(problem):
        raise _too_little(length, str(problem))


def _too_little(size: int, reason: str) -> ConfigError:
    return ConfigError(
        f"{size / 2**30:.2f} GiB of host memory could not be pinned ({reason}); `rcm plan` tells"
        " how much a run keeps there, all ranks of a machine together: set less of"
        " trainer.offload, or give the machine or container more memory"
    )


def _unregister(address: int) -> None:
    torch.cuda.synchronize()  # copies from it may be on their way
    torch.cuda.cudart().cudaHostUnregister(address)


def sharded_like(shard: Tensor, like: Tensor) -> Tensor:
    """`shard`, on any device, as the part that this rank holds of a tensor sharded as `like`; the
    shard itself where that is a plain tensor.

    A DTensor whose shard lies on the host is what FSDP2's own offloading makes, too: it can be
    saved, loaded and read, not computed with.
    """
    if not isinstance(like, DTensor):
        return shard
    # sharded along the first axis; the last one may hold fewer numbers
    shape = (*like.shape[:-1], shard.shape[-1]) if like.ndim > 1 else tuple(like.shape)
    stride = torch.empty(shape, device="meta").stride()
    meta = TensorMeta(torch.Size(shape), stride, shard.dtype)
    return DTensor(shard, replace(like._spec, tensor_meta=meta), requires_grad=False)


def zeros_on_host(like: Tensor, *, pinned: bool) -> Tensor:
    """Zeros of the shape and dtype of `like` in host memory, pinned for copies to CUDA."""
    memory = host_memory(like.numel() * like.itemsize, pinned=pinned).zero_()
    return memory.view(like.dtype).view(like.shape)


def passing(
    groups: Sequence[Sequence[Tensor]],
    visit: Callable[[int, list[Tensor]], None],
    *,
    device: torch.device,
) -> None:
    """Bring each of `groups` of host tensors to `device` in turn, let `visit(number, tensors)`
    change them in place, and take them back; the next group arrives meanwhile.

    At most three groups are on the device. The host's tensors are complete on return. Nothing is
    copied where `device` is the host.
    """
    if device.type != "cuda":
        for number, group in enumerate(groups):
            visit(number, list(group))
        return
    coming, going = _streams(device)
    current = torch.cuda.current_stream(device)

    def fetch(number: int) -> tuple[list[Tensor], torch.cuda.Event]:
        # memory of the stream that computes: another's would stay with that one
        here = [torch.empty_like(tensor, device=device) for tensor in groups[number]]
        coming.wait_stream(current)
        with torch.cuda.stream(coming):
            for tensor, value in zip(groups[number], here, strict=True):
                value.copy_(tensor, non_blocking=True)
                value.record_stream(coming)
        return here, coming.record_event()

    left: list[torch.cuda.Event] = []
    ahead = fetch(0) if groups else None
    for number, group in enumerate(groups):
        assert ahead is not None
        here, arrived = ahead
        if len(left) >= 2:  # no more groups on the way than that
            left[-2].synchronize()
        ahead = fetch(number + 1) if number + 1 < len(groups) else None
        current.wait_event(arrived)
        visit(number, here)
        going.wait_stream(current)
        with torch.cuda.stream(going):
            for tensor, value in zip(group, here, strict=True):
                tensor.copy_(value, non_blocking=True)
                value.record_stream(going)
        left.append(going.record_event())
    going.synchronize()  # whoever reads host memory next does not know of the stream


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Of copies to and from a device."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@dataclass
class _Place:
    """A storage of the device and where its bytes wait."""

    storage: torch.UntypedStorage
    size: int
    host: Tensor


class Shelf:
    """The memory of `tensors`, of one device: `leave` gives it back to the device's allocator,
    `arrive` takes it again with the values of before. The tensors stay the same objects.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors) if len(s)}
        sizes = [storage.nbytes() for storage in storages.values()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.bytes = sum(sizes)
        room = host_memory(self.bytes, pinned=self.device.type == "cuda").split(sizes)
        self._places = [
            _Place(storage, size, host)
            for storage, size, host in zip(storages.values(), sizes, room, strict=True)
        ]
        self.away = False

    def leave(self, *, copy: bool, stream: torch.cuda.Stream | None) -> None:
        """Free the memory, after a copy of the values unless the host has them. `stream`: of
        copies, on CUDA.
        """
        if self.away:
            return
        if copy:
            with _beside(stream, self.device):
                for place in self._places:
                    place.host.copy_(_bytes_of(place), non_blocking=True)
            if stream is not None:  # the memory may be taken again by what runs next
                torch.cuda.current_stream(self.device).wait_stream(stream)
        for place in self._places:
            place.storage.resize_(0)
        self.away = True

    def arrive(self, *, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """Take memory and begin to fill it; the event after which the values are there, None where
        they are.
        """
        if not self.away:
            return None
        for place in self._places:
            place.storage.resize_(place.size)
        self.away = False
        with _beside(stream, self.device):
            for place in self._places:
                _bytes_of(place).copy_(place.host, non_blocking=True)
        return None if stream is None else stream.record_event()


def _beside(stream: torch.cuda.Stream | None, device: torch.device) -> Any:
    """On `stream`, behind everything asked for so far."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def _bytes_of(place: _Place) -> Tensor:
    """The storage as bytes, for one copy."""
    view = torch.empty(0, dtype=torch.uint8, device=place.storage.device)
    return view.set_(place.storage, 0, (place.size,), (1,))


@dataclass
class Waiting:
    """A network that may wait in host memory: it comes back by itself when it is called, and when
    its stored parameters are asked for (`rcm.parallel.fsdp`). Attaches itself to `net`.

    `before`: called with this object and the forward's inputs when one begins, before the weights
    arrive. Blocks that
    FSDP2 does not gather begin as soon as their own weights are there.
    """

    net: nn.Module
    before: Callable[[Waiting, tuple[Any, ...]], None]
    _shelves: list[Shelf] = field(default_factory=list)
    _events: dict[int, torch.cuda.Event] = field(default_factory=dict)
    _stream: torch.cuda.Stream | None = None
    _changed: bool = True  # perhaps, since it left last

    def __post_init__(self) -> None:
        object.__setattr__(self.net, "waiting", self)
        # before FSDP2's own, which gathers what is then there
        self.net.register_forward_pre_hook(self._begin, prepend=True)
        if not isinstance(self.net, FSDPModule):
            for number, block in enumerate(blocks_of(self.net), start=1):
                block.register_forward_pre_hook(self._block_hook(number), prepend=True)

    @property
    def away(self) -> bool:
        """Whether its weights wait on the host."""
        return any(shelf.away for shelf in self._shelves)

    @property
    def bytes(self) -> int:
        """Host memory that it takes, once it has left."""
        return sum(shelf.bytes for shelf in self._shelves)

    def leave(self) -> None:
        """Give the device's memory back."""
        if self.away:
            return
        for module in self.net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        if not self._shelves:
            self._shelves = [Shelf(group) for group in self._groups()]
            device = self._shelves[0].device
            self._stream = _streams(device)[0] if device.type == "cuda" else None
        self._wait_for(self._events)
        for shelf in self._shelves:
            shelf.leave(copy=self._changed, stream=self._stream)
        self._changed = False

    def arrive(self) -> None:
        """Have the weights on the device, all of them, to read or to change. (No counter of writes
        is asked: torch's fused AdamW moves none.)
        """
        self._changed = True
        self._fetch()
        self._wait_for(self._events)

    def _fetch(self) -> None:
        for number, shelf in enumerate(self._shelves):
            event = shelf.arrive(stream=self._stream)
            if event is not None:  # kept also where there is no memory for the next one
                self._events[number] = event

    def _begin(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.before(self, inputs)
        self._fetch()
        self._wait_for(self._events if isinstance(self.net, FSDPModule) else (0,))

    def _block_hook(self, number: int) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _inputs: self._wait_for((number,))

    def _wait_for(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            event = self._events.pop(number, None)
            if event is not None and self._stream is not None:
                torch.cuda.current_stream(self._stream.device).wait_event(event)

    def _groups(self) -> list[list[Tensor]]:
        """Local shards: what lies outside the blocks, then block by block."""
        blocks = [_shards(block.parameters()) for block in blocks_of(self.net)]
        inside = {id(p) for block in blocks_of(self.net) for p in block.parameters()}
        return [_shards(p for p in self.net.parameters() if id(p) not in inside), *blocks]


def _shards(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p._local_tensor if isinstance(p, DTensor) else p for p in parameters]


def fetch_back(net: nn.Module) -> None:
    """Have the weights of `net` on its device, wherever they are."""
    waiting = getattr(net, "waiting", None)
    if waiting is not None:
        waiting.arrive()
