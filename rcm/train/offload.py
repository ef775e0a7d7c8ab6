"""What of a run's memory waits on the host, and when: states that the update alone touches, and
networks whose turn it is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rcm.core.errors import ConfigError
from rcm.core.records import Record
from rcm.parallel.apply import is_frozen
from rcm.parallel.host import Waiting


@dataclass(frozen=True)
class OffloadConfig(Record):
    """What waits in host memory (docs/scale.md). Numbers stay, bit for bit, on one device."""

    # AdamW's moments and the average, which pass through the device in the update
    states: bool = False
    # networks of other roles than the one in training, but the one that computes
    idle_roles: bool = False
    # weights, gradients and states of trained networks: gathered block by block for every pass,
    # updated by the host's processor (whose AdamW rounds otherwise than a card's)
    parameters: bool = False


class IdleRoles:
    """Keeps on the device the networks in training and the one that computes; the others wait in
    host memory. Without networks it does nothing.

    A network comes back when it is called or its weights are read (`rcm.parallel.host.Waiting`). It
    leaves when another one is called, and before backward passes. A pass with gradient through a
    network that is not in training is a `ConfigError`: the backward pass would find no weights.
    """

    def __init__(self) -> None:
        self._roles: dict[str, Waiting] = {}
        self._judges: set[str] = set()
        self._trained: tuple[str, ...] = ()

    def add(self, role: str, net: nn.Module, *, judges: bool = False) -> None:
        """Take charge of `net`, which has its weights, and let it leave. `judges`: gradients of a
        pass while another is in training are taken before any other network is called.
        """
        self._roles[role] = Waiting(net, self._called)
        if judges:
            self._judges.add(role)
        self._roles[role].leave()

    def watch(self, net: nn.Module) -> None:
        """Whenever `net`, which stays where it is, is called, the others leave."""
        net.register_forward_pre_hook(lambda *_: self.rest(), prepend=True)

    def begin(self, roles: Iterable[str]) -> None:
        """`roles` are in training from now on: they come, the others leave."""
        self._trained = tuple(roles)
        self.rest()
        for role in self._trained:
            if role in self._roles:
                self._roles[role].arrive()

    def rest(self) -> None:
        """Nothing but the networks in training is needed for now."""
        for role, waiting in self._roles.items():
            if role not in self._trained:
                waiting.leave()

    @property
    def bytes(self) -> int:
        """Host memory taken so far."""
        return sum(waiting.bytes for waiting in self._roles.values())

    def _called(self, called: Waiting, inputs: tuple[Any, ...]) -> None:
        for role, waiting in self._roles.items():
            if waiting is called:
                self._refuse_gradient(role, waiting.net, inputs)
            elif role not in self._trained:
                waiting.leave()

    def _refuse_gradient(self, role: str, net: nn.Module, inputs: tuple[Any, ...]) -> None:
        if role in self._trained or role in self._judges or not torch.is_grad_enabled():
            return
        through = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        if through or not is_frozen(net):
            raise ConfigError(
                f"this method passes gradients through {role} while"
                f" {', '.join(self._trained)} is trained, so its weights cannot wait in host"
                " memory before the backward pass; set trainer.offload.idle_roles=False"
            )
