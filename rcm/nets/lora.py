"""Adapters in training: y = W x + b + (alpha / rank) B A x, W, b frozen (arXiv 2106.09685).

One network may carry several sets of adapters, one per role that trains on it, and computes with
one of them or with none: student and fake score are then sets on one base, and the teacher is the
base itself. `AdaptedNet` is one role: the whole network to call, with the parameters and the state
dict of its own set alone. Names of factors are PEFT's (`LAYER.lora_A.weight`,
`LAYER.lora_B.weight`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.dual import pack, unpack
from rcm.core.errors import ConfigError
from rcm.core.records import require_kind
from rcm.nets.condition import Condition
from rcm.nets.kv_view import CacheView
from rcm.nets.layers import Linear
from rcm.nets.layout import TokenLayout

_FACTOR = re.compile(r"(.+)\.adapters\.(\w+)\.(down|up)")
_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight"}


class Chosen:
    """Which of the sets `roles` a network computes with; `name` None is the base alone."""

    def __init__(self, roles: tuple[str, ...]) -> None:
        self.roles = roles
        self.name: str | None = None

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within the context the set is `name`."""
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before


class LowRank(nn.Module):
    """The update `strength` B A: `down` A [rank, in_features], `up` B [out_features, rank]."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))


def _merged(weight: Tensor, down: Tensor, up: Tensor, strength: float) -> Tensor:
    """`weight` + strength B A, in its dtype. A product of its own kind: `mm_only` keeps the results
    of others, and these are weights.
    """
    return torch.addbmm(weight, up.unsqueeze(0), down.unsqueeze(0), alpha=strength)


class _AdaptedProduct(torch.autograd.Function):
    """x (W + s B A)^T + b; gradients for x, A, B alone, keeping only `x` and parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        strength: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.strength = strength
        return F.linear(x, _merged(weight, down, up, strength), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        grad, s = grads[0], ctx.strength
        x_grad = grad @ _merged(weight, down, up, s) if ctx.needs_input_grad[0] else None
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        down_grad = s * ((rows @ up).t() @ inputs)
        up_grad = s * (rows.t() @ F.linear(inputs, down))
        return x_grad, None, None, down_grad, up_grad, None


class AdaptedLinear(Linear):
    """A frozen linear layer, its parameters shared with `layer`, with one `LowRank` per role.

    The update is added to the weight at every call: a few passes over the weight, where adding B A
    x to the result would be as many over all tokens, which are much longer. It is rounded as a
    trained weight is before it is used.
    """

    def __init__(
        self, layer: Linear, chosen: Chosen, *, roles: Iterable[str], rank: int, strength: float
    ) -> None:
        super().__init__(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.requires_grad_(False)
        self.chosen = chosen
        size = (layer.in_features, layer.out_features)
        self.adapters = nn.ModuleDict(
            {role: LowRank(*size, rank=rank, strength=strength) for role in roles}
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features]; plain or dual."""
        if self.chosen.name is None:
            return super().forward(x)
        update = cast(LowRank, self.adapters[self.chosen.name])
        factors = (update.down, update.up, update.strength)
        if torch.is_grad_enabled():
            return _AdaptedProduct.apply(x, self.weight, self.bias, *factors)
        weight, (primal, tangent) = _merged(self.weight, *factors), unpack(x)
        tangent = None if tangent is None else F.linear(tangent, weight)
        return pack(F.linear(primal, weight, self.bias), tangent)


class AdaptedNet(nn.Module):
    """One role of an adapted `net`: its set of adapters, or with `role` None the base.

    Call it as the network. Parameters and state dict are those of the role alone, under names that
    do not mention it; everything else is the network's. FSDP2, Ulysses and recomputation are
    applied to `net`.
    """

    def __init__(self, net: nn.Module, role: str | None) -> None:
        super().__init__()
        if role is not None and role not in (roles := cast(Any, net).chosen.roles):
            raise ConfigError(f"no adapters of role {role!r}; the network has {', '.join(roles)}")
        self.net: Any = net
        self.role = role

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: Condition,
        layout: TokenLayout,
        cache: CacheView | None = None,
        *,
        context_only: bool = False,
        taps: Any = None,
    ) -> Any:
        """The network's forward with the adapters of this role."""
        with self.net.chosen.using(self.role):
            return self.net(x, timestep, cond, layout, cache, context_only=context_only, taps=taps)

    def prepare(self, cond: Condition) -> Condition:
        """The network's `prepare` with the adapters of this role."""
        with self.net.chosen.using(self.role):
            return self.net.prepare(cond)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of the role's own."""
        for name, parameter in self.net.named_parameters(prefix, recurse, remove_duplicate):
            if (own := self._own(name)) is not None:
                yield own, parameter

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]  # the one form that is called
        named = ((self._own(name), value) for name, value in self.net.state_dict().items())
        return {own: value for own, value in named if own is not None}

    def load_state_dict(self, *_: Any) -> None:
        """Refuses: `rcm.parallel.init.load_full` fills one role of a network, sharded or not."""
        raise TypeError("one role of an adapted network is filled with rcm.parallel.init.load_full")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def _own(self, name: str) -> str | None:
        """What a tensor of the network is called in this role; None for another role's."""
        found = _FACTOR.fullmatch(name)
        if found is None:
            return name if self.role is None else None
        return f"{found[1]}.{_NAMES[found[3]]}" if found[2] == self.role else None


def attach(
    net: Any, layers: Iterable[str], *, roles: Iterable[str], rank: int, alpha: float
) -> None:
    """Freeze `net` and give `layers` (paths inside each of its `blocks`) adapters for every role,
    in place; their values are undefined until loaded. `ConfigError` for a layer that is no plain
    one (quantised, or adapted), a rank below 1, and an alpha that is not positive.
    """
    require_kind("rank", rank, int)
    if rank < 1 or not 0 < alpha < math.inf:
        raise ConfigError(f"adapters need a rank of at least 1, got {rank}, and alpha={alpha} > 0")
    net.requires_grad_(False)
    roles = tuple(roles)
    net.chosen = Chosen(roles)
    for index, block in enumerate(net.blocks):
        for path in layers:
            layer = block.get_submodule(path)
            if type(layer) is not Linear:
                raise ConfigError(
                    f"blocks.{index}.{path} is a {type(layer).__name__}, which takes no low-rank"
                    " adapters; load the network as it was trained"
                )
            block.set_submodule(
                path,
                AdaptedLinear(layer, net.chosen, roles=roles, rank=rank, strength=alpha / rank),
            )


def is_adapted(net: nn.Module) -> bool:
    """Whether any layer of `net` carries adapters."""
    return any(isinstance(module, AdaptedLinear) for module in net.modules())


def initial_factors(role: AdaptedNet, *, seed: int) -> dict[str, Tensor]:
    """First values of a role's factors: A uniform in +-1/sqrt(in_features), as PEFT has it, and B
    zero, so that the network is its base. Drawn in float32 on the CPU: they do not depend on where
    the network lies.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, value in role.state_dict().items():
        shape = tuple(value.shape)
        if name.endswith(_NAMES["up"]):
            found[name] = torch.zeros(shape)
        else:
            found[name] = (2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5
    return found
