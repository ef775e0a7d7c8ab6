"""Attention back ends, their explicit choice, and the dispatcher that carries tangents.

`AttentionCore` is the one place in the networks that unpacks and packs dual tensors: with a tangent present it calls the fused primal
+ tangent attention once, otherwise the chosen back end. Tensors are [B, L, N, D]; a mask of None means every query sees every key.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.dual import in_dual_level, pack, unpack
from rcm.core.errors import ConfigError
from rcm.kernels.flash_jvp.api import flash_jvp
from rcm.kernels.masks import MaskSpec

ENVIRONMENT_KEY = "RCM_ATTENTION_BACKEND"
DENSE_MASK_LIMIT = 1 << 20
"""Up to this many query-key pairs a masked SDPA call gets a bool matrix; beyond, it becomes one unmasked call per run of equal queries."""


class AttentionBackend(Protocol):
    """Differentiable softmax attention on plain tensors."""

    name: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float) -> Tensor:
        """softmax(scale q k^T, masked) v. `q` [B, Lq, N, D], `k`, `v` [B, Lk, N, D]; returns [B, Lq, N, D] in the dtype of q."""


class _MaskMatrices:
    """Bool matrices of the last few masks on a device; a cache, not state."""

    def __init__(self, kept: int = 8) -> None:
        self._kept: dict[tuple[MaskSpec, torch.device], Tensor] = {}
        self._limit = kept

    def matrix(self, mask: MaskSpec, device: torch.device) -> Tensor:
        key = (mask, device)
        if key not in self._kept:
            while len(self._kept) >= self._limit:
                self._kept.pop(next(iter(self._kept)))
            with torch.inference_mode(False):  # a matrix may outlive the mode it was first asked for in
                self._kept[key] = mask.dense(device)
        return self._kept[key]


class Reference:
    """Eager attention with scores in float32 (float64 for float64), quadratic memory: the oracle, and what any functional transform
    can see through.
    """

    name = "reference"

    def __init__(self) -> None:
        self._matrices = _MaskMatrices()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float) -> Tensor:
        """See `AttentionBackend`."""
        compute = torch.promote_types(q.dtype, torch.float32)
        scores = scale * torch.einsum("bqnd,bknd->bnqk", q.to(compute), k.to(compute))
        if mask is not None and not mask.is_full:
            scores = scores.masked_fill(~self._matrices.matrix(mask, q.device), float("-inf"))
        return torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), v.to(compute)).to(q.dtype)


class SDPA:
    """torch's scaled_dot_product_attention. Full: one fused call. Masked: a bool matrix while it is small (`DENSE_MASK_LIMIT`), else
    one unmasked call per run of queries with equal keys, the keys' intervals concatenated, so that fused kernels serve every mask at
    its own density.
    """

    name = "sdpa"

    def __init__(self) -> None:
        self._matrices = _MaskMatrices()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float) -> Tensor:
        """See `AttentionBackend`."""
        if mask is None or mask.is_full:
            return _sdpa(q, k, v, scale=scale)
        segments = mask.row_segments()
        if len(segments) > 1 and mask.q_len * mask.kv_len <= DENSE_MASK_LIMIT:
            return _sdpa(q, k, v, scale=scale, matrix=self._matrices.matrix(mask, q.device))
        parts = [
            _sdpa(q[:, segment.q_start : segment.q_stop], _gather(k, segment.intervals), _gather(v, segment.intervals), scale=scale)
            for segment in segments
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, matrix: Tensor | None = None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=matrix, scale=scale).transpose(1, 2)


def _gather(x: Tensor, intervals: tuple[tuple[int, int], ...]) -> Tensor:
    """Rows of the intervals: a view of a single one, a copy of several."""
    pieces = [x[:, start:stop] for start, stop in intervals]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _reserved(name: str, *, module: str, hint: str) -> AttentionBackend:
    missing = importlib.util.find_spec(module) is None
    reason = f"{module} is not installed: {hint}" if missing else f"{module} is installed, but this version of rcm has no binding for it"
    raise ConfigError(
        f"attention backend '{name}' is not available: {reason}; choose {ENVIRONMENT_KEY} / net.attention from sdpa, reference"
    )


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "sdpa": SDPA,
    "reference": Reference,
    "flash2": partial(
        _reserved, "flash2", module="flash_attn", hint="pip install 'rcm[flash]' (flash-attn 2, built from source, needs CUDA)"
    ),
    "flash3": partial(_reserved, "flash3", module="flash_attn_interface", hint="build FlashAttention-3 (hopper/) from source, needs sm90"),
    "flex": partial(_reserved, "flex", module="torch.nn.attention.flex_attention", hint="needs torch with FlexAttention"),
    "te": partial(_reserved, "te", module="transformer_engine", hint="pip install 'rcm[te]' (needs a CUDA toolchain)"),
    "magi": partial(_reserved, "magi", module="magi_attention", hint="build MagiAttention from source, needs sm90"),
}


def resolve(name: str) -> AttentionBackend:
    """The back end called `name`. "auto" takes the environment's RCM_ATTENTION_BACKEND if set, else sdpa; any other name ignores the
    environment.

    The result's `.name` says which was chosen. Raises `ConfigError` for an unknown name, or one whose package is missing (saying what
    to install).
    """
    chosen = name if name != "auto" else os.environ.get(ENVIRONMENT_KEY, "") or "sdpa"
    if chosen not in BACKENDS:
        source = "net.attention" if name != "auto" else f"environment variable {ENVIRONMENT_KEY}"
        raise ConfigError(f"unknown attention backend {chosen!r} from {source}; choose from auto, {', '.join(BACKENDS)}")
    return BACKENDS[chosen]()


class AttentionCore(nn.Module):
    """Softmax attention on plain tensors through a back end, and on dual tensors through `flash_jvp`: one launch for primal and tangent.

    `jvp_implementation` is "reference", "triton", or "auto" = triton on CUDA and reference elsewhere.
    """

    def __init__(self, backend: AttentionBackend, *, jvp_implementation: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.jvp_implementation = jvp_implementation

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None = None, constant_keys: int = 0) -> Tensor:
        """softmax(q k^T / sqrt(D), masked) v for `q` [B, Lq, N, D], `k`, `v` [B, Lk, N, D]; each may be dual or plain, as is the result.

        `constant_keys`: number of leading keys whose k and v have zero tangent (a cached prefix), for which no tangent work is done.
        """
        scale = q.shape[3] ** -0.5
        if in_dual_level():
            (q, q_dot), (k, k_dot), (v, v_dot) = unpack(q), unpack(k), unpack(v)
            if not (q_dot is None and k_dot is None and v_dot is None):
                o, o_dot, _ = flash_jvp(
                    q, k, v, q_dot, k_dot, v_dot, mask=mask, scale=scale, tangent_start=constant_keys, implementation=self._jvp_choice(q)
                )
                return pack(o, o_dot)
        return self.backend(q, k, v, mask=mask, scale=scale)

    def _jvp_choice(self, q: Tensor) -> str:
        if self.jvp_implementation == "auto":
            return "triton" if q.is_cuda else "reference"
        return self.jvp_implementation
