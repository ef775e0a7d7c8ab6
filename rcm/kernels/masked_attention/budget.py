"""How wrong a masked attention may be: twice the error of eager code in the same dtype, both
against float64, for O and every gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rcm.kernels.flash_jvp.budget import relative_error
from rcm.kernels.masks import MaskSpec

OUTPUTS = ("o", "dq", "dk", "dv")
LEAST = 0.5
"""Least budget in units of the dtype's eps: half for the rounding of the result itself."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]
"""q, k, v."""


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec | None, scale: float
) -> Tensor:
    """softmax(scale q k^T, masked) v on `[B, L, N, D]` with every product and intermediate in the
    dtype of q. Builds the dense mask.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT) * scale
    if mask is not None and not mask.is_full:
        scores = scores.masked_fill(~mask.dense(q.device), float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def with_gradients(attend: Attention, inputs: Inputs, grad_o: Tensor) -> tuple[Tensor, ...]:
    """(o, dq, dk, dv) of `attend` at `inputs` for the output gradient `grad_o`."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        o = attend(q, k, v)
        return o.detach(), *torch.autograd.grad(o, (q, k, v), grad_o)


def errors_and_budgets(
    attend: Attention, inputs: Inputs, grad_o: Tensor, *, mask: MaskSpec | None, scale: float
) -> dict[str, tuple[float, float]]:
    """Per output of `OUTPUTS`: (error of `attend`, budget), norms of the difference over the norm
    of the float64 truth on the same inputs.

    The budget is twice the error of `eager_attention` in the dtype of the inputs, and never below
    `LEAST`. Sizes for tests only.
    """

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager_attention(q, k, v, mask=mask, scale=scale)

    q, k, v = (x.double() for x in inputs)
    truth = with_gradients(eager, (q, k, v), grad_o.double())
    yardstick, got = with_gradients(eager, inputs, grad_o), with_gradients(attend, inputs, grad_o)
    least = LEAST * torch.finfo(inputs[0].dtype).eps
    return {
        name: (relative_error(mine, exact), max(2 * relative_error(theirs, exact), least))
        for name, mine, theirs, exact in zip(OUTPUTS, got, yardstick, truth, strict=True)
    }
