"""This package's own masked attention as a back end, and the choice between back ends by measured
rules.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.kernels import replay
from rcm.kernels.masked_attention.api import Backward, forward_obstacle, masked_attention
from rcm.kernels.masked_attention.dense import rectangle_obstacle
from rcm.kernels.masks import Full, MaskSpec
from rcm.kernels.persistent_attention.api import attend as persistent_attention
from rcm.kernels.persistent_attention.api import obstacle as persistent_obstacle
from rcm.kernels.split_attention.api import num_splits, split_attention
from rcm.nets.attention_dense import SDPA, wants_gradient
from rcm.nets.attention_packages import WITHOUT_KEY, Flash3, Flash4, NotInstalled

RECTANGLES: tuple[Backward, ...] = ("cudnn", "flash")
"""Fused backward passes of a rectangle, the faster first (39.0 and 66.5 ms, chunks of 3)."""
MATRIX_WITH_GRADIENT = 4e8
MATRIX_WITHOUT_GRADIENT = 1e8
"""Batch x heads x query-key pairs up to which one SDPA call with a bool matrix beats kernels that
know the mask; see `choose`.
"""
LARGEST_MATRIX = 1 << 26
"""Pairs that such a matrix may have whatever the number of heads: 64 MiB."""
PERSISTENT_KEYS = 1500
"""Keys from which a captured dense call is faster by the persistent kernel than by cuDNN; fewer
were not measured.
"""
LONG = 32_760
"""Queries and keys from which FlashAttention-3 and -4 serve a call where one of them is installed;
fewer were not measured.
"""


class Fused:
    """This package's masked attention: one launch forward, dense rectangles backward
    (`rcm/kernels/masked_attention/`).

    CUDA; bf16 / fp16 with a gradient (head sizes in multiples of 8), also fp32 without. Raises
    `ConfigError` naming the reason for anything else.
    """

    name = "triton"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """See `AttentionBackend`."""
        obstacle = forward_obstacle(q, v)
        if not obstacle and not wants_gradient(q, k, v):
            return masked_attention(
                q, k, v, mask=mask, scale=scale, forward="triton", backward="cudnn"
            )
        shape = Full(q.shape[1], k.shape[1]) if mask is None else mask
        obstacles = (
            {}
            if obstacle
            else {name: rectangle_obstacle(name, q, v, mask=shape) for name in RECTANGLES}
        )
        usable = [name for name, why in obstacles.items() if why is None]
        if not usable:
            reasons = obstacle or "; ".join(
                f"backward {name}: {why}" for name, why in obstacles.items()
            )
            raise ConfigError(
                f"attention backend 'triton' does not apply: {reasons}; choose attention_backend /"
                " RCM_ATTENTION_BACKEND from auto, sdpa, reference"
            )
        return masked_attention(
            q, k, v, mask=mask, scale=scale, forward="triton", backward=usable[0]
        )


class MaskedFlash4(Flash4):
    """This package's masked attention whose gradient is FlashAttention-4's, rectangle by
    rectangle.
    """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """See `Package`."""
        return masked_attention(
            q, k, v, mask=mask, scale=scale, forward="triton", backward="flash4"
        )


DENSE: tuple[type[Flash3 | Flash4], ...] = (Flash3, Flash4)
"""What auto may take for long dense calls where it is installed, the first of them that works."""
MASKED: tuple[type[Flash3 | Flash4], ...] = (MaskedFlash4,)
"""The same for long masked calls with gradient."""


def choose(q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None) -> str:
    """What serves this call best, as measured: "sdpa", "matrix" (SDPA with a bool matrix),
    "triton", "triton + cudnn", "triton + flash", or, where it is installed and the call is long,
    "triton + flash4".

    One H200, torch 2.11, 12 heads of 128, bf16, milliseconds (docs/performance_log.md):

        teacher forcing over 65,520 tokens        chunks of 3   chunks of 1   chunks of 1, 4
        triton, no gradient                           11.9          11.2          13.1
        triton + cudnn, forward + backward            51.4          47.9          52.5
        triton + flash4, the same (another card)      46.7          44.2          48.0
        one SDPA call per segment                     63.1          88.6          61.8
        FlexAttention (Triton)                        73.6          68.2          76.3

        chunks of 3 over                          2,016     4,032     8,064    16,380 tokens
        matrix, forward + backward                 0.62      1.33      4.72     23.1
        triton + cudnn, forward + backward         2.41      2.88      2.38      4.73
        matrix, no gradient                        0.14      0.39      1.37      6.09
        triton, no gradient                        0.19      0.31      0.46      1.01

        dense                                     32,760 x 32,760   4,680 x 32,760   32,760 x 512
        sdpa (cuDNN), forward + backward               43.0               5.8             1.7
        triton + cudnn, forward + backward             42.5               6.2             2.1
        sdpa, no gradient                              11.7               1.85            0.20
        triton, no gradient                            11.1               2.11            0.41

    Dense calls go to `choose_dense`. Other cards than compute capability 9.0 were not
    measured: masked calls stay with SDPA there.
    """
    if mask is None or mask.is_full:
        return "sdpa"
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "sdpa"
    gradient = wants_gradient(q, k, v)
    pairs = mask.q_len * mask.kv_len
    work = q.shape[0] * q.shape[2] * pairs
    if (
        work <= (MATRIX_WITH_GRADIENT if gradient else MATRIX_WITHOUT_GRADIENT)
        and pairs <= LARGEST_MATRIX
    ):
        return "matrix"
    if forward_obstacle(q, v):
        return "sdpa"
    if not gradient:
        return "triton"
    if _is_long(q, k, v) and _package(MASKED, q, k, v) is not None:
        return "triton + flash4"
    usable = [name for name in RECTANGLES if rectangle_obstacle(name, q, v, mask=mask) is None]
    return f"triton + {usable[0]}" if usable else "sdpa"


def choose_dense(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What serves a call that sees everything best: "sdpa"; also "persistent kernel" and "cudnn in
    parts" inside a captured graph, where further launches cost nothing, without gradient, in 16
    bits, on compute capability 9.0; and there, outside of graphs, "flash3" or "flash4" for calls as
    long as `LONG` where the package is installed.

    One H200, torch 2.11, 12 heads of 128, bf16, 32,760 x 32,760, forward + backward / no gradient:
    cuDNN 44.0 / 10.8 to 11.3 ms, flash3 37.8 / 9.35, flash4 37.2 / 9.69 (docs/scale.md).
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if not torch.cuda.is_current_stream_capturing():
        if not _is_long(q, k, v) or replay.is_keeping():  # which sees torch's operators alone
            return "sdpa"
        package = _package(DENSE, q, k, v)
        return package.name if package is not None else "sdpa"
    if wants_gradient(q, k, v) or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "sdpa"
    if k.shape[1] >= PERSISTENT_KEYS and persistent_obstacle(q, k, v) is None:
        return "persistent kernel"
    return "cudnn in parts" if parts_of(q, k) > 1 else "sdpa"


def _is_long(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the measurement of the packages covers this call. Compiled code and runs that must
    repeat bit by bit stay with torch's own operators.
    """
    if torch.compiler.is_compiling() or min(q.shape[1], k.shape[1]) < LONG:
        return False
    if q.dtype != torch.bfloat16 or not q.shape[3] == v.shape[3] == 128:
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    return torch.cuda.get_device_capability(q.device) == (9, 0)


Kind = tuple[str, int, bool]
"""Name of a package, heads, and whether a gradient is wanted."""
_Package = type[Flash3 | Flash4]
_Long = Flash3 | Flash4 | None
_chosen: dict[tuple[int, bool, torch.device, tuple[_Package, ...]], _Long] = {}
_left_out: set[Kind] = set()


def _package(candidates: tuple[_Package, ...], q: Tensor, k: Tensor, v: Tensor) -> _Long:
    """The first of the candidates that is installed, loads and passes its trial for calls of this
    kind; None if there is none. Decided at the first call of a kind, for as long as the process
    lives: one that does not work is warned of once and not asked again, one that does is not
    replaced.
    """
    key = (q.shape[2], wants_gradient(q, k, v), q.device, candidates)
    if key not in _chosen:
        working = (package for package in candidates if package.name not in _unwanted())
        tried = (_tried(package, q, k, v) for package in working)
        _chosen[key] = next((backend for backend in tried if backend is not None), None)
    return _chosen[key]


def _tried(package: type[Flash3 | Flash4], q: Tensor, k: Tensor, v: Tensor) -> _Long:
    kind = (package.name, q.shape[2], wants_gradient(q, k, v))
    if kind in _left_out:
        return None
    try:
        backend = package.loaded()
        problem = backend.problem(q, k, v)
    except NotInstalled:
        return None
    except ConfigError as error:
        problem = str(error)
    if problem is None:
        return backend
    _left_out.add(kind)
    _say_once(package.name, problem)
    return None


def left_out() -> frozenset[Kind]:
    """Which packages `auto` found not to work, for which calls, in this process."""
    return frozenset(_left_out)


def leave_out(kinds: Iterable[Kind]) -> None:
    """Go on without these, too: ranks that train together choose alike."""
    for name, heads, gradient in set(kinds) - _left_out:
        _left_out.add((name, heads, gradient))
        _say_once(name, f"'{name}' does not work on another rank")
        for key in [key for key in _chosen if key[:2] == (heads, gradient)]:
            del _chosen[key]


def _unwanted() -> list[str]:
    """Back ends that the environment leaves out; `ConfigError` for names of no package."""
    names = os.environ.get(WITHOUT_KEY, "").replace(",", " ").split()
    known = [package.name for package in DENSE]
    if wrong := [name for name in names if name not in known]:
        raise ConfigError(
            f"environment variable {WITHOUT_KEY} names {', '.join(wrong)}, which auto never chooses"
            f" by itself; name some of {', '.join(known)}, or unset it"
        )
    return names


@lru_cache(maxsize=64)
def _say_once(name: str, problem: str) -> None:
    rank = os.environ.get("RANK")
    where = "" if rank is None else f"rank {rank}: "
    warnings.warn(
        f"{where}auto goes on without it: {problem}; {WITHOUT_KEY}={name} leaves it out from the"
        " start",
        stacklevel=2,
    )


def parts_of(q: Tensor, k: Tensor) -> int:
    """Parts along the keys in which cuDNN runs a dense call best where launches cost nothing."""
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return num_splits(q.shape[1], k.shape[1], q.shape[0] * q.shape[2], processors)


class Auto:
    """The back end that `choose` names, per call. `decisions` tells which kind of call went
    where.
    """

    name = "auto"

    def __init__(self) -> None:
        _unwanted()  # is said before anything is built
        self._sdpa = SDPA()
        self.decisions: dict[str, str] = {"dense": "sdpa"}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """See `AttentionBackend`."""
        if mask is None or mask.is_full:
            if (choice := choose_dense(q, k, v)) == "sdpa":
                return self._sdpa(q, k, v, mask=None, scale=scale)
            if choice in (Flash3.name, Flash4.name) and (package := _package(DENSE, q, k, v)):
                self.decisions["dense, long"] = choice
                return package(q, k, v, mask=None, scale=scale)
            self.decisions["dense, captured"] = choice
            if choice == "persistent kernel":
                return persistent_attention(q, k, v, scale=scale)
            return split_attention(q, k, v, scale=scale, parts=parts_of(q, k))
        return _masked(self, q, k, v, mask, scale)


# torch.compiler.disable would import the compiler with this module; this one does at the first call
@torch._disable_dynamo
def _masked(auto: Auto, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
    """A masked call: choose, note the choice, run."""
    choice = choose(q, k, v, mask=mask)
    kind = "masked with gradient" if wants_gradient(q, k, v) else "masked"
    noted = auto.decisions.get(kind, "").split(", ")
    if choice not in noted:
        auto.decisions[kind] = ", ".join([*filter(None, noted), choice])
    if choice == "matrix":
        return auto._sdpa.with_matrix(q, k, v, mask=mask, scale=scale)
    if choice == "sdpa":
        return auto._sdpa(q, k, v, mask=mask, scale=scale)
    if choice == "triton + flash4" and (package := _package(MASKED, q, k, v)):
        return package(q, k, v, mask=mask, scale=scale)
    backward: Backward = next((name for name in RECTANGLES if choice.endswith(name)), "cudnn")
    return masked_attention(q, k, v, mask=mask, scale=scale, forward="triton", backward=backward)
