"""Transforms of a tensor [B, S, N, D] before it is quantised, and what undoes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.core.errors import ConfigError

MAX_BALANCE = 16.0


@dataclass(frozen=True)
class Undo:
    """What a smoothing needs to be undone: "none" (also of clip), "balance" with bf16 factors [B,
    1, N, D], "hadamard", "reorder" with int16 places [B, 1, N, D] of the original channels.
    """

    kind: str = "none"
    tensor: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.tensor is None else self.tensor.nbytes


def smooth(x: Tensor, kind: str, *, alpha: float, percentile: float) -> tuple[Tensor, Undo]:
    """`x` float32 [B, S, N, D] transformed, and its undoing. `kind` is none, clip, balance,
    hadamard or reorder.
    """
    if kind == "none":
        return x, Undo()
    if kind == "clip":
        bound = quantile(x.abs().transpose(1, 2).flatten(2), percentile)[:, None, :, None]
        return torch.minimum(torch.maximum(x, -bound), bound), Undo()
    if kind == "hadamard":
        return hadamard(x), Undo("hadamard")
    mean = x.abs().mean(1, keepdim=True)
    if kind == "balance":
        ratio = mean / mean.mean(3, keepdim=True).clamp(min=1e-8)
        factor = ratio.pow(alpha).clamp(1 / MAX_BALANCE, MAX_BALANCE).to(torch.bfloat16)
        return x / factor.float(), Undo("balance", factor)
    order = mean.argsort(dim=3, descending=True, stable=True)
    return x.gather(3, order.expand_as(x)), Undo("reorder", order.argsort(dim=3).to(torch.int16))


def unsmooth(x: Tensor, undo: Undo) -> Tensor:
    """The inverse of `smooth`, in float32."""
    held = undo.tensor
    if held is None:
        return hadamard(x) if undo.kind == "hadamard" else x
    return x * held.float() if undo.kind == "balance" else x.gather(3, held.long().expand_as(x))


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis, its own inverse; `ConfigError` unless
    that axis is a power of two.
    """
    d = x.shape[-1]
    if d & (d - 1):
        raise ConfigError(
            f"hadamard smoothing needs heads of a power of two channels, got {d}; choose another"
            " --kv_smoothing_k / _v"
        )
    for level in range(d.bit_length() - 1):
        a, b = x.unflatten(-1, (-1, 2, 1 << level)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
    return x * d**-0.5


def quantile(x: Tensor, share: float) -> Tensor:
    """Quantile of the last axis, linear between neighbours. `torch.quantile` refuses more than 2^24
    elements.
    """
    place = share * (x.shape[-1] - 1)
    low = math.floor(place)
    top = x.topk(x.shape[-1] - low, dim=-1).values
    return torch.lerp(top[..., -1], top[..., max(-2, -top.shape[-1])], place - low)
