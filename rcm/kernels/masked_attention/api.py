"""The public contract of masked attention with gradient, and the explicit choice of its two
halves.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcm.core.errors import ConfigError
from rcm.kernels.flash_jvp.reference import reference_jvp
from rcm.kernels.flash_jvp.validation import MAX_HEAD, MIN_HEAD, Problem, check_problem
from rcm.kernels.launching import FLOATS
from rcm.kernels.masked_attention.backward import masked_backward
from rcm.kernels.masked_attention.dense import RECTANGLES, rectangle_obstacle
from rcm.kernels.masks import MaskSpec
from rcm.kernels.replay import kept

Forward = Literal["triton", "reference"]
Backward = Literal["cudnn", "flash", "flash4", "eager"]


# torch.compiler.disable would import the compiler with this module; this one does at the first call
@torch._disable_dynamo
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskSpec | None,
    scale: float | None = None,
    forward: Forward,
    backward: Backward,
) -> Tensor:
    """Softmax attention under a mask, differentiable once in reverse mode: softmax(scale q k^T,
    masked) v.

    Inputs, any strides, one float dtype and device:
        q          `[B, Lq, N, D]`
        k          `[B, Lk, N, D]`
        v          `[B, Lk, N, Dv]`; Dv may differ from D
        mask       a `MaskSpec` with `q_len = Lq`, `kv_len = Lk`; None lets every query see every
                   key.
        scale      of the scores; None means `D ** -0.5`.
    Both halves are chosen by the caller and never replaced silently:
        forward    "triton": one fused launch, CUDA (`flash_jvp` without tangents). "reference":
                   eager, any device and dtype.
        backward   how the gradient of one dense rectangle is computed (README.md): "cudnn",
                   "flash", "flash4" (FlashAttention-4, installed apart; CUDA, 16 bit, head sizes in
                   multiples of 8), "eager" (any device and dtype). dq of the first three differs in
                   the last bit from run to run; "flash" is reproducible under
                   `torch.use_deterministic_algorithms(True)`, where "cudnn" and "flash4" refuse.
    Returns `[B, Lq, N, Dv]`, contiguous, in the dtype of q. Saves q, k, v, the result and the
    log-sum-exp for the backward pass, and nothing quadratic; activation checkpointing may recompute
    it, or keep the result and the log-sum-exp (`rcm.kernels.replay`). Torch's compiler sees one
    opaque call. Raises `ValueError` (shapes, lengths, head sizes), `TypeError` (dtypes, devices),
    `RuntimeError` (dual tensors, Triton without CUDA), `ConfigError` (unknown halves, or a backward
    that cannot take these heads while a gradient is needed).
    """
    if forward not in ("triton", "reference"):
        raise ConfigError(
            f"unknown forward {forward!r} of masked attention; choose from triton, reference"
        )
    with torch.no_grad():
        problem = check_problem(
            q, k, v, q_dot=None, k_dot=None, v_dot=None, mask=mask, scale=scale, tangent_start=0
        )
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    obstacle = rectangle_obstacle(backward, q, v, mask=problem.mask)
    if needs_grad and obstacle:
        raise ConfigError(f"backward={backward!r} of masked attention does not apply: {obstacle}")
    if not needs_grad:
        with torch.no_grad():
            return _forward(q, k, v, problem.mask, problem.scale, forward)[0]
    return _MaskedAttention.apply(q, k, v, problem.mask, problem.scale, forward, backward)


def forward_obstacle(q: Tensor, v: Tensor) -> str | None:
    """Why `forward="triton"` cannot take heads like those of q and v, or None."""
    if not q.is_cuda:
        return f"it needs a CUDA device, the inputs are on {q.device}"
    if q.dtype not in FLOATS:
        return f"it needs bfloat16, float16 or float32, got {q.dtype}"
    if not all(MIN_HEAD <= width <= MAX_HEAD for width in (q.shape[3], v.shape[3])):
        return (
            f"it needs head sizes from {MIN_HEAD} to {MAX_HEAD}, got {q.shape[3]} and {v.shape[3]}"
        )
    return None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float, forward: Forward
) -> tuple[Tensor, Tensor]:
    """(o, lse) of what was checked; called where no gradient is recorded."""
    problem = Problem(q, k, v, None, None, None, mask, scale, tangent_start=0)
    if forward == "triton":
        # Triton is imported only when asked for
        from rcm.kernels.flash_jvp.launch import triton_jvp

        o, _, lse = triton_jvp(problem)
    else:
        o, _, lse = reference_jvp(problem)
    return o, lse


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: MaskSpec,
        scale: float,
        forward: Forward,
        backward: Backward,
    ) -> Tensor:
        o, lse = kept(lambda: _forward(q, k, v, mask, scale, forward))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask, ctx.scale, ctx.rectangle = mask, scale, RECTANGLES[backward]
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        grads = masked_backward(
            grad_o, q, k, v, o, lse, mask=ctx.mask, scale=ctx.scale, rectangle=ctx.rectangle
        )
        return *grads, None, None, None, None
