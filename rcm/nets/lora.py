"""Low-rank adapters in training: y = W x + b + (alpha / rank) B A x with W, b frozen (Hu et al. 2021, arXiv 2106.09685).

One network may carry several sets of adapters, one per role that trains on it, and computes with one of them
or with none: student and fake score are then sets on one base, and the teacher is the base itself. `AdaptedNet`
is one role: the whole network to call, with the parameters and the state dict of its own set alone. Names of
factors are PEFT's (`LAYER.lora_A.weight`, `LAYER.lora_B.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.dual import pack, unpack
from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.kv_view import CacheView
from rcm.nets.layers import Linear
from rcm.nets.layout import TokenLayout

_FACTOR = re.compile(r"(.+)\.adapters\.(\w+)\.(down|up)")
_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight"}


class Chosen:
    """Which set of adapters a network computes with; `name` None is the base alone."""

    def __init__(self) -> None:
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
    """`strength` B A x, added to what the layer itself gives. `down` A [rank, in_features], `up` B [out_features, rank]."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` [..., out_features] + strength B A `x` [..., in_features]; plain or dual."""
        (x, x_dot), (y, y_dot) = unpack(x), unpack(y)
        if x_dot is not None and y_dot is not None:
            y_dot = self._added(x_dot, y_dot)
        return pack(self._added(x, y), y_dot)

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.linear(x, self.down)
        rows = torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), self.up.t(), alpha=self.strength)
        return rows.view_as(y)


class AdaptedLinear(Linear):
    """A frozen linear layer, its parameters shared with `layer`, with one `LowRank` per role."""

    def __init__(self, layer: Linear, chosen: Chosen, *, roles: Iterable[str], rank: int, strength: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.requires_grad_(False)
        self.chosen = chosen
        sizes = layer.in_features, layer.out_features
        self.adapters = nn.ModuleDict({role: LowRank(*sizes, rank=rank, strength=strength) for role in roles})

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features]; plain or dual."""
        y = super().forward(x)
        return y if self.chosen.name is None else self.adapters[self.chosen.name](x, y)


class AdaptedNet(nn.Module):
    """One role of an adapted network `net` (its `chosen` says who computes): its set of adapters, or with `role` None the base.

    Call it as the network. Parameters and state dict are those of the role alone, under names that do not
    mention it; everything else is the network's. FSDP2, Ulysses and recomputation are applied to `net`.
    """

    def __init__(self, net: nn.Module, role: str | None) -> None:
        super().__init__()
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
    ) -> Tensor | None:
        """The network's forward with the adapters of this role."""
        with self.net.chosen.using(self.role):
            return self.net(x, timestep, cond, layout, cache, context_only=context_only)

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
        """The role's own tensors."""
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


def attach(net: Any, layers: Iterable[str], *, roles: Iterable[str], rank: int, alpha: float) -> None:
    """Freeze `net` and give `layers` (paths inside each of its `blocks`) adapters for every role, in place; their
    values are undefined until loaded. `ConfigError` for a layer that is no plain one (quantised, or adapted).
    """
    net.requires_grad_(False)
    net.chosen, roles = Chosen(), tuple(roles)
    for index, block in enumerate(net.blocks):
        for path in layers:
            layer = block.get_submodule(path)
            if type(layer) is not Linear:
                raise ConfigError(
                    f"blocks.{index}.{path} is a {type(layer).__name__}, which takes no low-rank adapters; "
                    "load the network as it was trained"
                )
            block.set_submodule(path, AdaptedLinear(layer, net.chosen, roles=roles, rank=rank, strength=alpha / rank))


def is_adapted(net: nn.Module) -> bool:
    """Whether any layer of `net` carries adapters."""
    return any(isinstance(module, AdaptedLinear) for module in net.modules())


def initial_factors(role: AdaptedNet, *, seed: int) -> dict[str, Tensor]:
    """First values of a role's factors: A uniform in +-1/sqrt(in_features), as PEFT has it, and B zero, so that
    the network is its base. Drawn in float32 on the CPU: they do not depend on where the network lies.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, value in role.state_dict().items():
        shape = tuple(value.shape)
        if name.endswith(_NAMES["up"]):
            found[name] = torch.zeros(shape)
        else:
            found[name] = (2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5
    return found
