"""What one rank finds alone, all ranks hear of: a refusal, a full disk, another configuration, a
peer that is gone.

A rank that raised by itself would leave the others waiting in their next collective. Everything
here is collective where a process group of several ranks exists, and does nothing otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rcm.core.errors import CheckpointError, ConfigError, NonFinite, PeerGone, first_line
from rcm.parallel.launch import told_rank

T = TypeVar("T")

_TRAVELLING = (ConfigError, CheckpointError, NonFinite)
"""Kinds of error that arrive at the other ranks as what they are; OSErrors do too, any other kind
as CheckpointError.
"""

_LOST = re.compile(
    r"gloo|NCCL|connection (closed|reset|refused)|broken pipe|socket|TCPStore|store->|timed? ?out",
    re.IGNORECASE,
)


def spread() -> bool:
    """Whether there are other ranks."""
    return dist.is_initialized() and dist.get_world_size() > 1


def agree(problem: Exception | None, *, group: dist.ProcessGroup | None = None) -> None:
    """Raise the first problem of any rank on every rank, one of the same kind and words; a rank
    with a problem of its own raises that. The error's `heard_from` says whose it is. One reduction
    of a number while nothing is wrong.
    """
    if not spread():
        if problem is not None:
            raise problem
        return
    wrong = torch.tensor([int(problem is not None)])
    with naming_lost_peers():
        dist.all_reduce(wrong, op=dist.ReduceOp.MAX, group=group)
        if not wrong.item():
            return
        ranks = dist.get_process_group_ranks(group)
        found: list[Any] = [None] * len(ranks)
        dist.all_gather_object(found, None if problem is None else _told(problem), group=group)
    rank, told = next(one for one in zip(ranks, found, strict=True) if one[1] is not None)
    error = problem or _rebuilt(told)
    vars(error)["heard_from"] = Voices(
        rank,
        own=problem is not None,
        repeated=_told(error) == told,
        unanimous=found.count(told) == len(found),
    )
    raise error


@dataclass(frozen=True)
class Voices:
    """Who found a problem that `agree` raised: `first`, the lowest such rank; whether this one did
    (`own`), in the same words (`repeated`), and whether all of them did so (`unanimous`).
    """

    first: int
    own: bool
    repeated: bool
    unanimous: bool


def sentence(error: BaseException) -> str:
    """What this rank prints of `error`, "" where another one has said it: each rank its own
    findings, the others one line that names it.
    """
    words, voices = " ".join(str(error).split()), getattr(error, "heard_from", None)
    rank = dist.get_rank() if dist.is_initialized() else told_rank()
    if voices is None or (
        voices.own and not voices.unanimous and not (voices.repeated and rank != voices.first)
    ):
        return f"error on rank {rank}: {words}" if "RANK" in os.environ else f"error: {words}"
    if voices.own:
        return f"error: {words}" if rank == voices.first else ""
    return f"error on rank {rank}: stopped because of rank {voices.first}: {words}"


def together(action: Callable[[], T]) -> T:
    """What `action`, a rank's own work without collectives, returns here; a failure on any rank is
    raised on every rank.
    """
    try:
        result = action()
    except Exception as error:
        agree(error)
        raise
    agree(None)
    return result


def on_first(action: Callable[[], T]) -> T | None:
    """What `action` returns on rank 0, None elsewhere; its failure is raised on every rank."""
    return together(lambda: action() if not spread() or dist.get_rank() == 0 else None)


def shared(value: T | None) -> T:
    """The object that rank 0 passes, on every rank."""
    box: list[Any] = [value]
    if spread():
        with naming_lost_peers():
            dist.broadcast_object_list(box, src=0)
    return box[0]


def greatest(numbers: Sequence[int], *, group: dist.ProcessGroup | None = None) -> list[int]:
    """The greatest of each number that a rank of `group` passes, on all of them: one reduction in
    host memory.
    """
    told = torch.tensor(list(numbers))
    with naming_lost_peers():
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    return told.tolist()


def union(values: frozenset[T]) -> frozenset[T]:
    """What any rank passes, on every rank."""
    if not spread():
        return values
    found: list[Any] = [None] * dist.get_world_size()
    with naming_lost_peers():
        dist.all_gather_object(found, values)
    return frozenset().union(*found)


def require_same(what: str, values: Mapping[str, Any], *, knob: str) -> None:
    """Raise ConfigError on every rank, with the keys and both values, unless all ranks passed equal
    `values`.
    """
    if not spread():
        return
    found: list[Any] = [None] * dist.get_world_size()
    with naming_lost_peers():
        dist.all_gather_object(found, dict(values))
    for rank, other in enumerate(found):
        keys = sorted(
            key for key in found[0].keys() | other.keys() if found[0].get(key) != other.get(key)
        )
        if keys:
            told = "; ".join(
                f"{key}: {found[0].get(key)!r} on rank 0, {other.get(key)!r} on rank {rank}"
                for key in keys[:3]
            )
            raise ConfigError(
                f"ranks differ in {what} ({told}{', and more' if len(keys) > 3 else ''}); {knob}"
            )


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Within, a collective that broke because another rank ended raises PeerGone instead of what
    its transport says.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise PeerGone(
            "another rank of this launch ended or cannot be reached: its own output says why; the"
            " last checkpoint stays in use"
        ) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed for want of the others."""
    if isinstance(error, PeerGone | dist.DistNetworkError):
        return True
    kinds = (RuntimeError, dist.DistBackendError, dist.DistError, dist.DistStoreError)
    return spread() and type(error) in kinds and _LOST.search(str(error)) is not None


def _told(problem: Exception) -> tuple[str, tuple[Any, ...]]:
    """An error as it can travel."""
    if isinstance(problem, OSError):
        return "OSError", (
            problem.errno,
            problem.strerror or str(problem),
            problem.filename and str(problem.filename),
        )
    for kind in _TRAVELLING:
        if isinstance(problem, kind):
            return kind.__name__, (str(problem),)
    # errors of a data format and the like are sentences; of anything unforeseen the first line is
    # enough, its own rank prints the rest
    ours = type(problem).__module__.startswith("rcm.")
    return CheckpointError.__name__, (str(problem) if ours else first_line(problem),)


def _rebuilt(told: tuple[str, tuple[Any, ...]]) -> Exception:
    name, arguments = told
    if name == "OSError":
        number, words, path = arguments
        return (
            OSError(words)
            if number is None
            else OSError(number, words, path)
            if path
            else OSError(number, words)
        )
    return next(kind for kind in _TRAVELLING if kind.__name__ == name)(*arguments)
