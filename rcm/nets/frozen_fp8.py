"""Linear layers of a frozen network with weights in e4m3 and a scale per output row: a byte per
weight instead of two, sharded and loaded like any parameter.

The rule is that of `rcm.kernels.fused.quantise`; rows are rounded where they lie, so that a rank
rounds its own shard. docs/scale.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.dual import has_tangent, pack, unpack
from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.kernels.fused import quantise
from rcm.nets.layers import Linear

FrozenWeights = Literal["compute", "fp8_storage", "fp8"]
"""compute: the compute dtype. fp8_storage: e4m3, made wide again for each product. fp8: products of
e4m3 numbers, where inputs are rounded, too."""
SCALE = "_scale"
"""End of the name of a weight's scales."""


class FrozenFP8Linear(nn.Module):
    """y = x W^T + b with W in e4m3, scaled per row. Parameters `weight` [N, K] e4m3, `weight_scale`
    [N, 1] float32, `bias` [N], none of which takes a gradient.

    Without `products` the weight is made wide for each call: gradients and tangents of `x` pass,
    as through a frozen `Linear` of the rounded weight. With them `x` is rounded per row and the
    product is that of the e4m3 numbers: an `x` with gradient or tangent is a `ConfigError`.
    """

    def __init__(self, layer: nn.Linear, *, products: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.products = products
        with torch.no_grad():
            weight, scale = quantise.reference(layer.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features], dtype of `x`; plain, or dual without
        `products`.
        """
        if self.products:
            return self._product(x)
        primal, tangent = unpack(x)
        weight = self.wide(primal.dtype)
        y = F.linear(primal, weight, self.bias)
        return pack(y, None if tangent is None else F.linear(tangent, weight))

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The rounded weight in `dtype`: e4m3 numbers are exact in it, their product with the scale
        is rounded once.
        """
        return self.weight.to(dtype).mul_(self.weight_scale)

    def _product(self, x: Tensor) -> Tensor:
        if has_tangent(x) or (torch.is_grad_enabled() and x.requires_grad):
            raise ConfigError(
                "FP8 products give neither gradients nor tangents; set"
                " model.config.frozen_weights=fp8_storage, whose products are wide"
            )
        if x.is_cuda and x.dtype != torch.bfloat16:
            raise ConfigError(
                f"FP8 products on a GPU need bfloat16, the input is {x.dtype}; set"
                " model.config.frozen_weights=fp8_storage"
            )
        rows = quantise.quantise_rows(x.reshape(-1, self.in_features))
        y = quantise.product(rows, (self.weight, self.weight_scale), self.bias, dtype=x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a layer with a weight of this shape is rounded: FP8 products take such sizes."""
    return not any(size % quantise.ALIGNMENT for size in shape)


def round_linears_(net: nn.Module, which: FrozenWeights) -> nn.Module:
    """Replace the linear layers of the blocks of a frozen `net`, in place, by ones in e4m3; those
    whose sizes do not fit stay, as do embeddings, time layers, modulation and head. Returns `net`.

    The network may be on the meta device; `load_rows` fills its layers. `ConfigError` for weights
    that are trained, and another word than those of `FrozenWeights`.
    """
    require_kind("frozen weights", which, FrozenWeights)
    if which == "compute":
        return net
    for block in cast(nn.ModuleList, net.blocks):
        for path, layer in list(block.named_modules()):
            if type(layer) in (Linear, nn.Linear) and fits(tuple(layer.weight.shape)):
                if layer.weight.requires_grad:
                    raise ConfigError(
                        "weights that are trained cannot be rounded to FP8; frozen roles alone can"
                    )
                block.set_submodule(path, FrozenFP8Linear(layer, products=which == "fp8"))
    return net


def is_rounded(net: nn.Module) -> bool:
    """Whether any weight of `net` is in e4m3."""
    return any(isinstance(module, FrozenFP8Linear) for module in net.modules())


def scales_of(names: Iterable[str]) -> dict[str, str]:
    """Names of the weights in e4m3 among those of a state dict -> names of their scales."""
    known = set(names)
    return {name: name + SCALE for name in known if name + SCALE in known}


@torch.no_grad()
def load_rows(weight: Tensor, scale: Tensor, rows: Tensor) -> None:
    """Round `rows` [N, K] of a weight into `weight` [N, K] e4m3 and `scale` [N, 1]; by the plain
    formula, which cards without FP8 have, too.
    """
    if rows.numel():
        found, scales = quantise.reference(rows)
        weight.copy_(found)
        scale.copy_(scales)
