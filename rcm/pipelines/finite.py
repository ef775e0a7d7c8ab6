"""Whether what a stream hands out is finite: told by largest magnitudes that stay on the device
until the host waits for pixels anyway, and where it went wrong if not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rcm.core.errors import NonFinite
from rcm.nets.condition import Condition
from rcm.nets.frozen_fp8 import SCALE, scales_of
from rcm.nets.lora import AdaptedNet
from rcm.nets.velocity_model import VelocityModel
from rcm.parallel.agree import agree
from rcm.parallel.host import fetch_back
from rcm.rollout.autoregressive import ChunkLoop

DECODER = (
    "the decoder made NaN or infinite pixels of finite latents; look at its weights and its"
    " precision (--vae_precision)"
)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude in `x`, a float64 scalar where `x` is; NaN or inf where one is."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, math.inf).double()
    low, high = torch.aminmax(x)  # a twentieth of the norm's time on a CPU
    return torch.maximum(-low, high).double()


class Reading:
    """The largest magnitudes of latents and, where there are any, of their pixels on the way to the
    host. On CUDA it is there once the current stream came to this point.
    """

    def __init__(self, latents: Tensor, pixels: Tensor | None = None) -> None:
        parts = (latents,) if pixels is None else (latents, pixels)
        found = torch.stack([largest(x) for x in parts])
        self._done: torch.cuda.Event | None = None
        self._found = found
        if found.is_cuda:
            self._found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._found.copy_(found, non_blocking=True)
            self._done = torch.cuda.current_stream(found.device).record_event()

    @property
    def ready(self) -> bool:
        """Whether reading it lets the host wait for nothing."""
        return self._done is None or self._done.query()

    def wrong(self) -> str | None:
        """What is NaN or infinite, "latents" or "pixels"; None if nothing is."""
        if self._done is not None:
            self._done.synchronize()
        bad = (math.isfinite(x) for x in self._found.tolist())
        # not strict: a chunk without pixels has one flag
        return next(
            (what for what, ok in zip(("latents", "pixels"), bad, strict=False) if not ok), None
        )


class FiniteGuard:
    """Looks at what a stream makes. `begun` before each block, `step` after each denoising step of
    it, `handed` for what is handed out; `problem` says what is wrong with that.
    """

    def __init__(self) -> None:
        self._steps: dict[int, list[Tensor]] = {}
        self._seen: dict[int, frozenset[int]] = {}
        self._unread = deque[tuple[int, Reading]]()
        self._block = 0

    def begun(self, block: int, loop: ChunkLoop) -> None:
        """`block` is made next, of what `loop` has cached."""
        self._block, self._steps[block] = block, []
        self._seen[block] = frozenset(chunk.id for chunk in loop.cache.branches[0].chunks)
        needed = min([block - 2, *(unread for unread, _ in self._unread)])
        for made in [known for known in self._steps if known < needed]:
            del self._steps[made], self._seen[made]

    def step(self, x: Tensor) -> None:
        """`x` came of the next step of the block."""
        self._steps[self._block].append(largest(x))

    def handed(self, block: int, reading: Reading) -> None:
        """`reading` is of `block` or a part of it."""
        self._unread.append((block, reading))

    def forget(self) -> None:
        """Another state is taken up."""
        self._steps, self._seen = {}, {}
        self._unread.clear()

    def problem(self, loop: ChunkLoop, cond: Condition, *, wait: bool) -> NonFinite | None:
        """The first thing that is wrong with what was handed out, as far as it is known; `wait`:
        with all of it.
        """
        while self._unread and (wait or self._unread[0][1].ready):
            block, reading = self._unread.popleft()
            if (what := reading.wrong()) is not None:
                return NonFinite(self._sentence(block, what, loop, cond))
        return None

    def _sentence(self, block: int, what: str, loop: ChunkLoop, cond: Condition) -> str:
        begin = f"chunk {block} of this stream is not finite"
        if what == "pixels":
            return f"{begin}: {DECODER}"
        steps = [math.isfinite(float(x)) for x in self._steps.get(block, ())]
        stage = f" after step {steps.index(False) + 1} of {len(steps)}" if False in steps else ""
        return f"{begin}{stage}: {cause(loop, cond, self._seen.get(block, frozenset()))}"


def require_finite_weights(model: VelocityModel) -> None:
    """`NonFinite`, naming the first such weight, for a network with NaN or infinite ones. Attention
    of a CPU makes zeros of queries that are NaN, so what comes out may be finite and wrong. Of a
    sharded network every rank looks at its part, and all hear of it.
    """
    net, problem = net_of(model), None
    if (name := bad_weight(net)) is not None:
        wrong = "NaN, infinite or not above 0" if name.endswith(SCALE) else "NaN or infinite"
        problem = NonFinite(
            f"the network's weight {name} is {wrong}; load the checkpoint again, or another one"
        )
    if any(isinstance(x, DTensor) for x in net.parameters()):
        agree(problem)
    elif problem is not None:
        raise problem


def cause(loop: ChunkLoop, cond: Condition, seen: Iterable[int]) -> str:
    """What made a chunk NaN or infinite, of all that went into it, and what to look at; `seen`: ids
    of the chunks that were cached before.
    """
    if (name := bad_weight(net_of(loop.denoiser))) is not None:
        return f"the network's weight {name} is not; load the checkpoint again, or another one"
    others = getattr(loop.denoiser, "negative", None)
    if not all(_finite(x) for c in (cond, others) if c is not None for x in c.tensors()):
        return (
            "the embedding of its prompt is not; encode it again (--text_cache may keep an old one)"
        )
    for cache in loop.cache.branches:
        for chunk in (held for held in cache.chunks if held.id in seen):
            for layer in range(cache.num_layers):
                if not all(map(_finite, cache.store.read(layer, chunk.pieces))):
                    return (
                        f"what the cache holds of chunk {chunk.id} in layer {layer} is not;"
                        " restart() the stream, or restore() a snapshot"
                    )
    return (
        "weights, prompt and cache are, so the network's arithmetic overflowed; try a wider"
        " precision (--precision fp32), without FP8 and without a quantised cache"
    )


def bad_weight(net: nn.Module) -> str | None:
    """The name of the first parameter or buffer that is NaN or infinite, or of the first scale of
    weights in e4m3 that is not above 0; None if there is none. Adapters of a role are looked at
    with the network that they are on. Of sharded tensors this rank's part counts. A network that
    waits in host memory comes back.
    """
    fetch_back(net)
    tensors, looked = dict(_tensors(net)), dict[str, Tensor]()
    scales = set(scales_of(tensors).values())
    for name, x in tensors.items():
        part = _wide(x)
        if part.is_floating_point() and part.numel():
            looked[name] = largest(part.where(part > 0, math.nan) if name in scales else part)
    if not looked:
        return None
    found = torch.stack(list(looked.values())).isfinite().tolist()
    return next((name for name, ok in zip(looked, found, strict=True) if not ok), None)


def net_of(model: VelocityModel) -> nn.Module:
    """The network of a denoiser, guided or not."""
    denoiser: Any = getattr(model, "denoiser", model)
    return denoiser.net


def _tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from net.named_parameters()
    yield from net.named_buffers()
    if isinstance(net, AdaptedNet) and net.role is not None:
        yield from AdaptedNet(net.net, None).named_parameters()


def _finite(x: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel():
        return True
    return math.isfinite(float(largest(_wide(x))))


def _wide(x: Tensor) -> Tensor:
    """FP8 in a type that has arithmetic; of a sharded tensor this rank's part."""
    x = (x.to_local() if isinstance(x, DTensor) else x).detach()
    return x.float() if x.is_floating_point() and x.dtype.itemsize == 1 else x
