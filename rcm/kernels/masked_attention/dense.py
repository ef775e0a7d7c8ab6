"""The flash backward of one dense rectangle, given O and the log-sum-exp of whole rows: cuDNN,
FlashAttention-2 of torch, FlashAttention-4 where it is installed, or eager.

All take `[C, Lq, N, D]` queries and `[C, Lk, N, D]` keys of C rectangles, `lse` `[C, N, Lq]`
float32 and contiguous, and compute P = exp(scale q k^T - lse), dV = P^T dO, dS = P * (dO v^T -
rowsum(dO * O)), dQ = scale dS k, dK = scale dS^T q.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.kernels.masked_attention.rectangles import combs
from rcm.kernels.masks import MaskSpec

SCORES_AT_ONCE = 1 << 26
"""Upper bound of the score matrix that the eager rectangle holds, in elements."""


class RectangleBackward(Protocol):
    """Gradient of attention restricted to a rectangle of pairs."""

    def __call__(
        self,
        grad_o: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) in the shapes of q, k, v."""


def cudnn_rectangle(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Through cuDNN's fused attention. Sums dQ with atomic additions: not bit-reproducible."""
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    heads_first = (x.transpose(1, 2) for x in (grad_o, q, k, v, o))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first, lse.unsqueeze(-1), unused, unused, None, None, None, q.shape[1], k.shape[1],
        0.0, False, scale=scale,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def flash_rectangle(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the FlashAttention-2 inside torch; bit-reproducible under
    `torch.use_deterministic_algorithms(True)`.
    """
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad_o, q, k, v, o, lse, None, None, q.shape[1], k.shape[1], 0.0, False, unused, unused,
        scale=scale,
    )  # fmt: skip


def flash4_rectangle(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Through FlashAttention-4, which has no public call for a backward pass alone: that of
    4.0.0b36. Sums dQ with atomic additions: not bit-reproducible.
    """
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(q, k, v, o, grad_o, lse, scale)
    return dq, dk, dv


def eager_rectangle(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By plain matrix products in float32 (float64 for float64), any device, in pieces of bounded
    memory.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    grad_o, q, k, v, o = (x.transpose(1, 2).to(compute) for x in (grad_o, q, k, v, o))
    delta = (grad_o * o).sum(dim=-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, SCORES_AT_ONCE // (k.shape[0] * k.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        rows = (slice(None), slice(None), slice(start, start + step))
        p = (scale * (q[rows] @ k.mT) - lse[rows][..., None]).exp()
        ds = scale * p * (grad_o[rows] @ v.mT - delta[rows])
        dv += p.mT @ grad_o[rows]
        dq[rows] = ds @ k
        dk += ds.mT @ q[rows]
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


RECTANGLES: dict[str, RectangleBackward] = {
    "cudnn": cudnn_rectangle,
    "flash": flash_rectangle,
    "flash4": flash4_rectangle,
    "eager": eager_rectangle,
}
"""The choices of `backward=`."""


def rectangle_obstacle(name: str, q: Tensor, v: Tensor, *, mask: MaskSpec) -> str | None:
    """Why the rectangle backward `name` cannot take heads like those of q and v under `mask`, or
    None. Raises ConfigError for an unknown name.
    """
    if name not in RECTANGLES:
        raise ConfigError(
            f"unknown backward {name!r} of masked attention; choose from {', '.join(RECTANGLES)}"
        )
    if name == "eager":
        return None
    if not q.is_cuda:
        return f"it needs a CUDA device, the inputs are on {q.device}"
    major, minor = torch.cuda.get_device_capability(q.device)
    oldest = 9 if name == "flash4" else 8
    if major < oldest:
        return f"it needs compute capability {oldest}.0 or higher, this card has {major}.{minor}"
    if name == "flash4" and not _has_flash4():
        return "flash_attn.cute is not installed: pip install --pre 'flash-attn-4[cu13]'"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    widths = (q.shape[3], v.shape[3])
    wide = name == "flash" or (name == "cudnn" and (major, minor) == (9, 0))
    limit = 256 if wide else 128
    if any(width % 8 or width > limit for width in widths):
        return (
            f"it needs head sizes that are multiples of 8 up to {limit}, got {widths[0]} and"
            f" {widths[1]}"
        )
    if name != "cudnn" and widths[0] != widths[1]:
        return f"it needs equal head sizes of keys and values, got {widths[0]} and {widths[1]}"
    if name != "flash" and torch.are_deterministic_algorithms_enabled():
        whose = {"cudnn": "cuDNN", "flash4": "FlashAttention-4"}[name]
        return (
            f"{whose}'s fused backward is not deterministic, and torch.use_deterministic_algorithms"
            " is on"
        )
    if name == "cudnn" and min(call.k_len for call in combs(mask)) == 1:
        return "it needs at least two keys per rectangle, and this mask has blocks of one key"
    return None


@lru_cache(maxsize=1)
def _has_flash4() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # nor is there a package that it would be part of
        return False
