"""Attention back ends, their explicit choice, and the dispatcher that carries tangents.

`AttentionCore` is the one place in the networks that unpacks and packs dual tensors: with a tangent
present it calls the fused primal + tangent attention once, otherwise the chosen back end. Tensors
are [B, L, N, D]; a mask of None means every query sees every key.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from rcm.core.dual import in_dual_level, pack, unpack
from rcm.core.errors import ConfigError
from rcm.kernels.flash_jvp.api import Implementation, flash_jvp
from rcm.kernels.masks import MaskSpec
from rcm.nets.attention_auto import Auto, Fused
from rcm.nets.attention_dense import SDPA, Cudnn, Reference
from rcm.nets.attention_flex import Flex
from rcm.nets.attention_packages import Flash2, Flash3, Flash4, Magi, TransformerEngine

ENVIRONMENT_KEY = "RCM_ATTENTION_BACKEND"


class AttentionBackend(Protocol):
    """Differentiable softmax attention on plain tensors."""

    name: str

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        """softmax(scale q k^T, masked) v. `q` [B, Lq, N, D], `k`, `v` [B, Lk, N, D]; returns [B,
        Lq, N, D] in the dtype of q.
        """


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "auto": Auto,
    "reference": Reference,
    "sdpa": SDPA,
    "cudnn": Cudnn,
    "triton": Fused,
    "flex": Flex,
    "flex_triton": partial(Flex, "triton"),
    "flex_flash": partial(Flex, "flash"),
    "flash2": Flash2,
    "flash3": Flash3,
    "flash4": Flash4,
    "magi": Magi,
    "te": TransformerEngine,
}
"""Every choice by name; the configuration's `attention_backend` takes the same names
(docs/extending.md describes them).
"""


def resolve(name: str | AttentionBackend) -> AttentionBackend:
    """The back end called `name`; a back end is returned as it is. "auto" takes the environment's
    RCM_ATTENTION_BACKEND if set, else chooses per call (`attention_auto.choose`); any other name
    ignores the environment.

    The result's `.name` says which was chosen. Raises `ConfigError` for an unknown name, or one
    whose package is missing (saying what to install).
    """
    if not isinstance(name, str):
        return name
    chosen = name if name != "auto" else os.environ.get(ENVIRONMENT_KEY, "") or "auto"
    if chosen not in BACKENDS:
        source = "net.attention" if name != "auto" else f"environment variable {ENVIRONMENT_KEY}"
        raise ConfigError(
            f"unknown attention backend {chosen!r} from {source}; choose from {', '.join(BACKENDS)}"
        )
    return BACKENDS[chosen]()


def attention_name(attention_backend: str, *, flex_backend: str) -> str:
    """The one name for `resolve` behind the keys `attention_backend` and `flex_backend` (the kernel
    under FlexAttention: auto, triton, flash); "" is auto. Raises `ConfigError` where `flex_backend`
    would have no effect.
    """
    backend, kernel = attention_backend or "auto", flex_backend or "auto"
    if kernel == "auto" or backend == f"flex_{kernel}":
        return backend
    if backend != "flex":
        raise ConfigError(
            f"flex_backend={kernel} (or RCM_FLEX_BACKEND) has no effect with"
            f" attention_backend={backend}: it chooses the kernel of attention_backend=flex; set"
            " that too, or leave flex_backend at auto"
        )
    return f"flex_{kernel}"


def configured(attention_backend: str, *, flex_backend: str) -> AttentionBackend:
    """The back end of the two configuration keys; the environment was the configuration's to read.

    Raises `ConfigError` as `attention_name` does, and for a package that is missing.
    """
    return BACKENDS[attention_name(attention_backend, flex_backend=flex_backend)]()


class AttentionCore(nn.Module):
    """Softmax attention: a back end on plain tensors, one `flash_jvp` launch on dual ones.

    `jvp_implementation` is "reference", "triton", or "auto" = triton on CUDA and reference
    elsewhere.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        *,
        jvp_implementation: Implementation | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.jvp_implementation = jvp_implementation
        self.tangent_choices: set[str] = set()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None = None, constant_keys: int = 0
    ) -> Tensor:
        """softmax(q k^T / sqrt(D), masked) v for `q` [B, Lq, N, D], `k`, `v` [B, Lk, N, D]; each
        may be dual or plain, as is the result.

        `constant_keys`: number of leading keys whose k and v have zero tangent (a cached prefix),
        for which no tangent work is done. `ValueError` for tensors or a mask that do not fit: back
        ends would broadcast them, or read past their end.
        """
        _require_fitting(q, k, v, mask)
        scale = q.shape[3] ** -0.5
        if in_dual_level():
            (q, q_dot), (k, k_dot), (v, v_dot) = unpack(q), unpack(k), unpack(v)
            if not (q_dot is None and k_dot is None and v_dot is None):
                choice = self._jvp_choice(q)
                o, o_dot, _ = flash_jvp(
                    q,
                    k,
                    v,
                    q_dot,
                    k_dot,
                    v_dot,
                    mask=mask,
                    scale=scale,
                    tangent_start=constant_keys,
                    implementation=choice,
                )
                self.tangent_choices.add(choice)
                return pack(o, o_dot)
        return self.backend(q, k, v, mask=mask, scale=scale)

    def _jvp_choice(self, q: Tensor) -> Implementation:
        if self.jvp_implementation == "auto":
            return "triton" if q.is_cuda else "reference"
        return self.jvp_implementation


def _require_fitting(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None) -> None:
    queries, keys, values = q.shape, k.shape, v.shape
    fits = len(queries) == 4 and keys == (queries[0], keys[1], queries[2], queries[3])
    if not fits or values[:3] != keys[:3] or len(values) != 4 or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention takes q [B, Lq, N, D], k and v [B, Lk, N, D] of one dtype, got"
            f" {tuple(queries)} {q.dtype}, {tuple(keys)} {k.dtype} and {tuple(values)} {v.dtype}"
        )
    if mask is not None and (mask.q_len, mask.kv_len) != (queries[1], keys[1]):
        raise ValueError(f"{mask} does not fit {queries[1]} queries and {keys[1]} keys")


def attention_record(net: nn.Module) -> dict[str, Any]:
    """For the record of a run, `{"backend": name, "calls": {kind of call: what served it}}`.

    With a named back end it serves every plain call; under "auto" the kinds are "dense", "dense,
    captured", "dense, long", "masked" and "masked with gradient", those that happened so far
    ("dense" always). "tangent" is there once a tangent pass ran.
    """
    cores = [module for module in net.modules() if isinstance(module, AttentionCore)]
    calls: dict[str, str] = {}
    for backend in {id(core.backend): core.backend for core in cores}.values():
        calls |= backend.decisions if isinstance(backend, Auto) else {"all": backend.name}
    tangents = sorted(set().union(*(core.tangent_choices for core in cores)))
    if tangents:
        calls["tangent"] = ", ".join(tangents)
    return {"backend": ", ".join(sorted({core.backend.name for core in cores})), "calls": calls}
