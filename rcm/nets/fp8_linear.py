"""FP8 products for inference: e4m3 weights scaled per output row, inputs rounded per token.

The format is that of Micikevicius et al. 2022 (arXiv:2209.05433), the rule that of
`rcm.kernels.fused.quantise`. On machines without FP8 products it is emulated: the result differs by
the accumulation of the sum only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rcm.core.dual import has_tangent
from rcm.core.errors import ConfigError
from rcm.kernels.fused import quantise

CAPABILITY = (8, 9)


class FP8Linear(nn.Module):
    """y = x W^T + b, W in e4m3, x rounded per token; layers with one input share one product.

    With `gelu` the input passes a GELU (tanh form) first, in the kernel that rounds it. Rounded
    weights are neither saved nor loaded, have no gradient and no tangent: each attempt is a
    `ConfigError`. A cast of the network leaves them alone, a move takes them along.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, *layers: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self.gelu = gelu
        with torch.no_grad():
            weights: list[Tensor] = [layer.weight for layer in layers]
            weight, scale = quantise.quantise_rows(torch.cat(weights))
            biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
            bias = torch.cat(biases) if biases else None
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("weight_scale", scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features], dtype of `x`."""
        if has_tangent(x) or (torch.is_grad_enabled() and x.requires_grad):
            raise _refusal("give neither gradients nor tangents")
        if x.is_cuda and x.dtype != torch.bfloat16:
            raise ConfigError(
                f"FP8 products on a GPU need bfloat16, the input is {x.dtype}; run in bfloat16, or"
                " set --fp8 off"
            )
        rows = quantise.quantise_rows(x.reshape(-1, self.in_features), gelu=self.gelu)
        y = quantise.product(rows, (self.weight, self.weight_scale), self.bias, dtype=x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def train(self, mode: bool = True) -> FP8Linear:
        if mode:
            raise _refusal("do not train")
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, gelu={self.gelu}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                changed = moved.dtype != buffer.dtype
                self._buffers[name] = buffer.to(moved.device) if changed else moved
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        refuse_saving()

    def _load_from_state_dict(self, *_: Any) -> None:
        refuse_loading()


class SharedProjections:
    """Parts of one product for layers that are called in turn with one input, as q, k, v are.

    The first of them computes all parts, the last one forgets them. Other orders and inputs give
    right results, too, for more products.
    """

    def __init__(self, whole: FP8Linear, sizes: tuple[int, ...]) -> None:
        self.whole, self.sizes = whole, sizes
        self.held: _Held | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """Part `index` [..., sizes[index]] of the product, a view."""
        held = self.held
        if held is None or not held.serves(x, index):
            held = self.held = _Held(x, _version(x), list(self.whole(x).split(self.sizes, dim=-1)))
        part, held.parts[index] = held.parts[index], None
        assert part is not None
        if all(other is None for other in held.parts):
            self.held = None
        return part


class FP8Part(nn.Module):
    """One layer of several that share an input and a product."""

    def __init__(self, shared: SharedProjections, index: int) -> None:
        super().__init__()
        self.shared, self.index, self.whole = shared, index, shared.whole
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features]: a view of the shared product."""
        return self.shared.part(x, self.index)


class _Held(NamedTuple):
    x: Tensor
    version: int | None
    parts: list[Tensor | None]

    def serves(self, x: Tensor, index: int) -> bool:
        return self.x is x and self.version == _version(x) and self.parts[index] is not None


def _version(x: Tensor) -> int | None:
    """Counts writes to `x`; inference tensors are not counted."""
    return None if x.is_inference() else x._version


def check_device(device: torch.device) -> None:
    """`ConfigError` for a GPU without FP8 products; other devices emulate them."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ConfigError(
            f"FP8 products need compute capability 8.9 or later, {device} has {found}; set"
            " --fp8 off"
        )


def refuse_saving(*_: Any) -> None:
    """Hook of a quantised network's `state_dict`."""
    raise _refusal("are not saved")


def refuse_loading(*_: Any) -> None:
    """Hook of a quantised network's `load_state_dict`; it runs before anything is loaded."""
    raise _refusal("are not loaded")


def _refusal(what: str) -> ConfigError:
    return ConfigError(
        f"FP8 linears {what}: they are rounded copies for inference; load the network without --fp8"
    )
