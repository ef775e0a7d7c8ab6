"""Linear layers of a network in training whose products are those of e4m3 numbers: weights stay as
they are stored and gathered, both factors are rounded at each call. docs/scale.md.

The format is that of Micikevicius et al. 2022 (arXiv:2209.05433), the rule that of
`rcm.kernels.fused.quantise`. Parameters keep their names, so FSDP2, averages and checkpoints see
the network that they know. On machines without FP8 products these are emulated.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rcm.core.dual import has_tangent
from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.kernels.fused import quantise
from rcm.nets.frozen_fp8 import fits
from rcm.nets.layers import Linear

LinearPrecision = Literal["compute", "fp8"]
"""compute: products in the compute dtype. fp8: products of e4m3 numbers, but for the gradients of
weights, which are sums over all tokens."""
TEXT = ("cross_attn.k", "cross_attn.v")
"""Layers of a block that see the tokens of the prompt alone: too few to pay for rounding a
weight."""


class TrainedFP8Linear(Linear):
    """y = x W^T + b from `x` rounded per token and W per output row, its parameters shared with
    `layer`.

    The gradient of `x` is a product of e4m3 numbers, too: that of y rounded per token, W per input
    column. That of W is taken in the compute dtype from what was not rounded. A dual `x` takes the
    products of `Linear`, so that tangents are exactly those of the weights as they are.
    """

    def __init__(self, layer: nn.Linear) -> None:
        bias = layer.bias is not None
        super().__init__(layer.in_features, layer.out_features, bias=bias, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features], dtype of `x`; plain or dual."""
        if has_tangent(x):
            return super().forward(x)
        if x.is_cuda and x.dtype != torch.bfloat16:
            raise ConfigError(
                f"FP8 products on a GPU need bfloat16, the input is {x.dtype}; set"
                " model.config.precision=bfloat16 or linear_precision=compute"
            )
        return cast(Tensor, _Product.apply(x, self.weight, self.bias))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = quantise.quantise_rows(x.reshape(-1, x.shape[-1]))
        y = quantise.product(rows, quantise.quantise_rows(weight), bias, dtype=x.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            factors = quantise.quantise_rows(rows), quantise.quantise_rows(weight.t())
            x_grad = quantise.product(*factors, None, dtype=grad.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            weight_grad = rows.t() @ inputs
        if ctx.needs_input_grad[2]:
            bias_grad = rows.sum(dim=0)
        return x_grad, weight_grad, bias_grad


def train_in_fp8_(net: nn.Module, which: LinearPrecision) -> nn.Module:
    """Replace the linear layers of the blocks of `net`, in place, by ones with FP8 products; those
    of the prompt's tokens and those whose sizes do not fit stay, as do embeddings, time layers,
    modulation and head. Returns `net`, which may be on the meta device. `ConfigError` for another
    word than those of `LinearPrecision`.
    """
    require_kind("linear precision", which, LinearPrecision)
    if which == "compute":
        return net
    for block in cast(nn.ModuleList, net.blocks):
        for path, layer in list(block.named_modules()):
            if type(layer) is Linear and path not in TEXT and fits(tuple(layer.weight.shape)):
                block.set_submodule(path, TrainedFP8Linear(layer))
    return net
