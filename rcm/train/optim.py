"""AdamW over sharded master weights, and the learning-rate schedule as a pure function of a role's
own update count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.parallel.fsdp import local
from rcm.train.kept_adamw import KeptAdamW
from rcm.train.moments import States, forms

_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(Record):
    """AdamW of one role (arXiv 1711.05101) with decay on every parameter, norms and biases
    included, as in the release (docs/reference/training.md#optimiser-and-ema). Master weights are
    fp32.
    """

    # fusedadamw alone: the fused kernel is taken wherever torch has it
    type: Literal["fusedadamw", "adamw"] = "fusedadamw"
    # peak learning rate, which the schedule multiplies; a weight moves by about lr per update
    lr: float = within(1e-4, above=0, most=1)
    # decoupled, per unit of lr, applied to every parameter
    weight_decay: float = within(0.1, least=0)
    betas: tuple[float, float] = (0.9, 0.99)  # decay of first and second moment, in [0, 1)
    # added to the root of the second moment; float32 must hold it, or 0 / 0 makes weights NaN
    eps: float = within(1e-8, least=1e-37, most=1)
    # form in which both moments are kept: bfloat16 rounded at random; int8, float8 need torchao
    states: States = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise ConfigError(f"betas[{i}]={beta} must be in [0, 1)")

    def build(self, parameters: Iterable[Tensor], *, host: bool = False) -> torch.optim.Optimizer:
        """The optimiser over those `parameters` that require a gradient; its state has their
        sharding, and their dtype (master weights) unless `states` says otherwise. `host`: the
        moments live in host memory. `ConfigError` for states whose package is missing.
        """
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            raise ConfigError(
                "an optimiser was asked for a network without trainable parameters; frozen roles"
                " take no optimiser"
            )
        options: dict[str, Any] = {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "betas": self.betas,
            "eps": self.eps,
        }
        if host or self.states != "float32":
            return KeptAdamW(trained, forms=forms(self.states), host=host, **options)
        fused = all(p.device.type in _FUSED_DEVICES for p in trained)
        return ShardAdamW(trained, fused=fused, **options)


class ShardAdamW(torch.optim.AdamW):
    """AdamW that computes on this rank's shards. Parameters and states stay sharded tensors;
    dispatching an update over hundreds of them costs the host five times as much, while the device
    waits.
    """

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        complex_found = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return complex_found


@dataclass(frozen=True, kw_only=True)
class LambdaLinear(Record):
    """Learning-rate factor: linear warm-up, then a linear way from f_max to f_min over one cycle,
    f_min afterwards.

    Update n (0-based, of the role itself) gets f_start + (f_max - f_start) n / warm_up_steps while
    n < warm_up_steps, then f_max + (f_min - f_max) (n - warm_up_steps) / (cycle_length -
    warm_up_steps).
    """

    # updates from f_start to f_max
    warm_up_steps: int = within(100, least=0, most=10**12)
    # update at which f_min is reached; 0 = constant at f_max
    cycle_length: int = within(0, least=0, most=10**12)
    f_start: float = within(1e-6, least=0)  # factor at update 0
    f_max: float = within(1.0, least=0)  # factor after the warm-up
    f_min: float = within(1.0, least=0)  # factor at the end of the cycle (kept from then on)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.cycle_length <= self.warm_up_steps:
            raise ConfigError(
                f"cycle_length={self.cycle_length} must exceed warm_up_steps={self.warm_up_steps}"
            )

    def factor(self, update: int) -> float:
        """Factor of update `update` >= 0."""
        if update < self.warm_up_steps:
            return self.f_start + (self.f_max - self.f_start) * update / self.warm_up_steps
        if not self.cycle_length:
            return self.f_max
        done = min((update - self.warm_up_steps) / (self.cycle_length - self.warm_up_steps), 1.0)
        return self.f_max + (self.f_min - self.f_max) * done
