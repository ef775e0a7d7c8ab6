"""Tangents of a whole network by means that share nothing with the dual pass: functorch on eager
attention, and central differences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rcm.nets.attention import AttentionCore


class EagerAttention(nn.Module):
    """Attention in three operators, without any knowledge of duals."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask=None, constant_keys: int = 0) -> Tensor:
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) * q.shape[3] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.dense(q.device), float("-inf"))
        return torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), v)


def with_eager_attention(net: nn.Module) -> nn.Module:
    """A copy of `net` with every `AttentionCore` replaced."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AttentionCore):
                setattr(module, name, EagerAttention())
    return net


def functorch_jvp(fn: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Value and tangent by `torch.func.jvp`; None is an explicit zero."""
    dots = tuple(torch.zeros_like(p) if d is None else d for p, d in zip(primals, tangents, strict=True))
    with torch.no_grad():
        return torch.func.jvp(fn, primals, dots)


@torch.no_grad()
def central_difference(
    fn: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...], step: float = 1e-3
) -> Tensor:
    """Tangent of fourth order in `step` from four evaluations."""

    def at(h: float) -> Tensor:
        return fn(*(p if d is None else p + h * d for p, d in zip(primals, tangents, strict=True)))

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
