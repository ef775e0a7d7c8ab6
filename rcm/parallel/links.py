"""One-way connections between neighbouring ranks, beside the collectives of a network: each has a
group of its own, so its transfers wait for nobody else's.

On CUDA a transfer is a kernel that waits on the card until both ends are there. It runs on a stream
of higher priority, as must the work around it: streams of one priority share hardware queues, and a
transfer that waits in front of an all-to-all, on either end, would wait for ever.
"""

from __future__ import annotations

from collections import deque
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

MOST_UNDER_WAY = 2
"""Sent tensors that are kept until they have arrived."""
TRANSFER_BLOCKS = 4
"""Multiprocessors that a waiting transfer takes from the network."""


class Link:
    """Tensors from rank `source` to rank `target` of the launch, in order. On CUDA the current
    stream waits, not the host.
    """

    def __init__(self, group: dist.ProcessGroup, *, source: int, target: int) -> None:
        self._group, self._source, self._target = group, source, target
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._expected: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, x: Tensor) -> None:
        """Hand over `x`, which is not written again; waits for the one before the last."""
        while len(self._sent) >= MOST_UNDER_WAY:
            self._sent.popleft()[0].wait()
        work = dist.isend(x, dst=self._target, group=self._group)
        assert work is not None  # this rank is of the group
        self._sent.append((work, x))

    def release(self) -> None:
        """Let go of what has arrived; the rest goes with later sends."""
        self._sent = deque(sent for sent in self._sent if not sent[0].is_completed())

    def expect(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> None:
        """Be ready for the next tensor."""
        x = torch.empty(shape, dtype=dtype, device=device)
        work = dist.irecv(x, src=self._source, group=self._group)
        assert work is not None  # this rank is of the group
        self._expected.append((work, x))

    def take(self) -> Tensor:
        """The oldest that is expected, once it is there."""
        work, x = self._expected.popleft()
        work.wait()
        return x


def chain(count: int, *, kind: str) -> tuple[Link | None, Link | None]:
    """Links along the ranks count - 1, ..., 1, 0 of the launch, for tensors on devices of `kind`
    "cuda" or "cpu": (from the rank above, to the rank below) of this one. Collective over all
    ranks; made once per launch, so that streams opened one after the other share them.
    """
    rank = dist.get_rank()
    links = _chain(dist.group.WORLD, count, kind)
    return links.get((rank + 1, rank)), links.get((rank, rank - 1))


@cache
def _chain(world: dist.ProcessGroup, count: int, kind: str) -> dict[tuple[int, int], Link]:
    found = {}
    for below in range(count - 1):
        backend, options = "gloo", None
        if kind == "cuda":
            backend, options = "nccl", dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options.config.max_ctas = TRANSFER_BLOCKS
        group = dist.new_group([below, below + 1], backend=backend, pg_options=options)
        found[below + 1, below] = Link(group, source=below + 1, target=below)
    return found
