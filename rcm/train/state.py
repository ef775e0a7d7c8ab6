"""Everything that training changes and a checkpoint keeps: networks, optimisers, update counts,
EMA, the iteration. (The loader keeps its own position.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from rcm.core.errors import ConfigError
from rcm.parallel.fsdp import stored_parameters
from rcm.train.ema import EMAConfig, PowerEMA
from rcm.train.optim import AdamWConfig, LambdaLinear

STUDENT = "student"
CHECKPOINT_NAMES: Mapping[str, str] = MappingProxyType(
    {STUDENT: "net", "fake_score": "net_fake_score", "gan_head": "net_gan_head"}
)
"""Role -> prefix of its weights in a checkpoint; `optim_<prefix without "net_">` holds its
optimiser.
"""


@dataclass
class RoleState:
    """One trained network with its optimiser. `updates` counts this role's own updates and drives
    its schedule.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLinear
    base_lr: float
    updates: int = 0

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.base_lr * self.schedule.factor(self.updates)

    def step(self) -> float:
        """Apply the gradients with the scheduled rate, count the update, and return that rate."""
        lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"], group["update"] = lr, self.updates
        self.optimizer.step()
        self.updates += 1
        return lr


@dataclass
class TrainState:
    """Roles by name, the student's EMA (None: no averaging), and the number of finished iterations
    (updates of either role).
    """

    roles: dict[str, RoleState]
    ema: PowerEMA | None = None
    iteration: int = 0

    @classmethod
    def create(
        cls,
        trainable: Mapping[str, nn.Module],
        *,
        optim: Mapping[str, AdamWConfig],
        schedule: LambdaLinear | Mapping[str, LambdaLinear],
        ema: EMAConfig | None,
        host: bool = False,
    ) -> TrainState:
        """State before the first iteration. `trainable`: networks by role, parallelised and loaded;
        `optim`: their optimisers' settings. `host`: what the update alone touches, moments and
        average, lives in host memory.

        The EMA starts as a copy of the student. Raises ConfigError for an unknown role or a role
        without optimiser settings.
        """
        roles = {}
        for role, net in trainable.items():
            if role not in CHECKPOINT_NAMES:
                raise ConfigError(
                    f"role {role!r} cannot be trained; trained roles are"
                    f" {', '.join(CHECKPOINT_NAMES)}"
                )
            if role not in optim:
                raise ConfigError(
                    f"trained role {role!r} has no optimiser settings; set optimizer (student) or"
                    " model.config.optimizer_fake_score (fake_score), model.config.gan.optimizer"
                    " (gan_head)"
                )
            plan = schedule if isinstance(schedule, LambdaLinear) else schedule[role]
            optimizer = optim[role].build(stored_parameters(net).values(), host=host)
            roles[role] = RoleState(net, optimizer, plan, optim[role].lr)
        return cls(roles, None if ema is None else PowerEMA(trainable[STUDENT], ema, host=host))
