"""Attention with tangent by means that share nothing with `rcm.kernels`: functorch and central
differences on dense matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.kernels.masks import MaskSpec

TENSORS = ("q", "k", "v", "q_dot", "k_dot", "v_dot")


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float) -> tuple[Tensor, Tensor]:
    """(o [B, Lq, N, Dv], lse [B, N, Lq]) by one masked softmax over everything."""
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(q.device), float("-inf"))
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), v), scores.logsumexp(dim=-1)


def forward_mode(inputs: dict[str, Tensor | None], *, mask: MaskSpec | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(o, o_dot, lse) in float64 through `torch.func.jvp` of `dense_attention`; a missing tangent
    is an explicit zero here.
    """
    primals = tuple(inputs[name].double() for name in TENSORS[:3])
    tangents = tuple(torch.zeros_like(p) if inputs[n] is None else inputs[n].double() for n, p in zip(TENSORS[3:], primals, strict=True))
    (o, lse), (o_dot, _) = torch.func.jvp(lambda q, k, v: dense_attention(q, k, v, mask=mask, scale=scale), primals, tangents)
    return o, o_dot, lse


def central_difference(inputs: dict[str, Tensor | None], *, mask: MaskSpec | None, scale: float, step: float = 1e-5) -> Tensor:
    """o_dot in float64 from two evaluations along the tangent."""

    def at(sign: float) -> Tensor:
        moved = [
            inputs[p].double() + (0 if inputs[t] is None else sign * step * inputs[t].double())
            for p, t in zip(TENSORS[:3], TENSORS[3:], strict=True)
        ]
        return dense_attention(*moved, mask=mask, scale=scale)[0]

    return (at(1.0) - at(-1.0)) / (2 * step)


def random_inputs(
    *,
    q_len: int,
    kv_len: int,
    heads: int = 2,
    batch: int = 2,
    d_qk: int = 16,
    d_v: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    tangents: str = "qkv",
    tangent_start: int = 0,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Six `[B, L, N, D]` tensors; tangents not named are None, those of keys are zero before
    `tangent_start`.

    Values and tangents share a component that is the same for all keys, as real activations do:
    then the normaliser term of the tangent is as large as the others and leaving it out cannot
    hide.
    """
    d_v = d_qk if d_v is None else d_v
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (q_len, d_qk), "k": (kv_len, d_qk), "v": (kv_len, d_v)}
    inputs: dict[str, Tensor | None] = {}
    for name in TENSORS:
        length, width = shapes[name[0]]
        value = torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64)
        shared = torch.randn(1, 1, 1, width, generator=generator, dtype=torch.float64)
        inputs[name] = (value + shared).to(dtype).to(device)
        if name.endswith("_dot") and name[0] not in tangents:
            inputs[name] = None
        elif name in ("k_dot", "v_dot"):
            inputs[name][:, :tangent_start] = 0
    return inputs


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Euclidean norm of the difference over the norm of the truth; NaN counts as infinite."""
    error = (got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)
    return float("inf") if torch.isnan(error) else float(error)
