"""Attention back ends made of dense calls: eager, torch's fused one, and their use of masks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm.core.errors import ConfigError
from rcm.core.process_wide import ProcessWide
from rcm.kernels.masks import MaskSpec

DENSE_MASK_LIMIT = 1 << 20
"""Up to this many query-key pairs a masked SDPA call gets a bool matrix; beyond, it becomes one
unmasked call per run of equal queries.
"""

DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


def wants_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


class MaskMatrices:
    """Bool matrices of the last masks, at most `limit` bytes (one may exceed it); no state.

    Bounded by memory, not by number: selective recomputation refuses to make a forgotten matrix
    again in the backward pass, and the chunks of one rollout have a mask each.
    """

    def __init__(self, limit: int = 1 << 28) -> None:
        self._kept: dict[tuple[MaskSpec, torch.device], Tensor] = {}
        self._limit = limit

    def matrix(self, mask: MaskSpec, device: torch.device) -> Tensor:
        """`mask` as bool `[q_len, kv_len]` on `device`."""
        key = (mask, device)
        found = self._kept.get(key)
        if found is None:
            kept = dict(self._kept)  # other threads look into the old one
            size = mask.q_len * mask.kv_len
            while kept and sum(x.nbytes for x in kept.values()) + size > self._limit:
                kept.pop(next(iter(kept)))
            # a matrix may outlive the mode it was first asked for in
            with torch.inference_mode(False):
                found = mask.dense(device)
            self._kept = kept | {key: found}
        return found


def by_segment(
    attend: DenseAttention, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None
) -> Tensor:
    """`attend(q, k, v)` on `[B, L, N, D]` under `mask`: one unmasked call per run of queries with
    equal keys, the keys' intervals concatenated, so that a fused dense kernel serves every mask at
    its own density. Without a mask one call.
    """
    if mask is None or mask.is_full:
        return attend(q, k, v)
    parts = [
        attend(
            q[:, segment.q_start : segment.q_stop],
            _gather(k, segment.intervals),
            _gather(v, segment.intervals),
        )
        for segment in mask.row_segments()
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _gather(x: Tensor, intervals: tuple[tuple[int, int], ...]) -> Tensor:
    """Rows of the intervals: a view of a single one, a copy of several."""
    pieces = [x[:, start:stop] for start, stop in intervals]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class Reference:
    """Eager attention with scores in float32 (float64 for float64), quadratic memory: the oracle,
    and what any functional transform can see through.
    """

    name = "reference"

    def __init__(self) -> None:
        self._matrices = MaskMatrices()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        compute = torch.promote_types(q.dtype, torch.float32)
        scores = scale * torch.einsum("bqnd,bknd->bnqk", q.to(compute), k.to(compute))
        if mask is not None and not mask.is_full:
            scores = scores.masked_fill(~self._matrices.matrix(mask, q.device), float("-inf"))
        return torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), v.to(compute)).to(q.dtype)


class SDPA:
    """torch's scaled_dot_product_attention, with the fused kernel that torch prefers. Full: one
    call. Masked: a bool matrix while it has at most `matrix_pairs` elements (None:
    `DENSE_MASK_LIMIT`), else one unmasked call per run of queries with equal keys.
    """

    name = "sdpa"

    def __init__(self, *, matrix_pairs: int | None = None) -> None:
        self._matrices = MaskMatrices()
        self._matrix_pairs = matrix_pairs

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        if mask is not None and not mask.is_full and len(mask.row_segments()) > 1:
            limit = DENSE_MASK_LIMIT if self._matrix_pairs is None else self._matrix_pairs
            if mask.q_len * mask.kv_len <= limit:
                return self.with_matrix(q, k, v, mask=mask, scale=scale)
        return by_segment(lambda q, k, v: _sdpa(q, k, v, scale=scale), q, k, v, mask=mask)

    def with_matrix(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec, scale: float
    ) -> Tensor:
        """One call with the mask as a bool matrix, of any size."""
        return _sdpa(q, k, v, scale=scale, matrix=self._matrices.matrix(mask, q.device))


def _cudnn_alone() -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


CUDNN_ALONE = ProcessWide(_cudnn_alone)
"""Torch's choice of kernels is one for all threads."""


class Cudnn:
    """cuDNN's fused attention through torch: one dense call per run of queries with equal keys.
    CUDA, 16 bit; raises `ConfigError` elsewhere.
    """

    name = "cudnn"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
    ) -> Tensor:
        if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                "attention backend 'cudnn' needs bfloat16 or float16 on a CUDA device, got"
                f" {q.dtype} on {q.device}; choose attention_backend / RCM_ATTENTION_BACKEND from"
                " auto, sdpa, reference"
            )
        with _cudnn_alone() if torch.compiler.is_compiling() else CUDNN_ALONE:
            return by_segment(lambda q, k, v: _sdpa(q, k, v, scale=scale), q, k, v, mask=mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, matrix: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=matrix, scale=scale).transpose(1, 2)
