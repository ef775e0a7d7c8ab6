"""AdamW over sharded master weights, and the learning-rate schedule as a pure function of a role's own update count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.core.errors import ConfigError

_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (arXiv 1711.05101) with decay on every parameter, norms and biases included, as in the release
    (docs/reference/training.md#optimiser-and-ema).

    `lr` is the rate that the schedule multiplies; `weight_decay` is per unit of lr; `betas` in [0, 1). Raises ConfigError outside these
    domains.
    """

    lr: float = 1e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr={self.lr} must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={self.betas} must be two numbers in [0, 1)")
        if self.weight_decay < 0 or not self.eps > 0:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay} must be >= 0 and optimizer.eps={self.eps} positive")

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.AdamW:
        """The optimiser over those `parameters` that require a gradient; its state has their dtype (master weights) and their sharding."""
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            raise ConfigError("an optimiser was asked for a network without trainable parameters; frozen roles take no optimiser")
        fused = all(p.device.type in _FUSED_DEVICES for p in trained)
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, eps=self.eps, fused=fused)


@dataclass(frozen=True, kw_only=True)
class LambdaLinear:
    """Learning-rate factor: linear warm-up, then a linear way from f_max to f_min over one cycle, f_min afterwards.

    Update n (0-based, of the role itself) gets f_start + (f_max - f_start) n / warm_up_steps while n < warm_up_steps, then
    f_max + (f_min - f_max) (n - warm_up_steps) / (cycle_length - warm_up_steps). `cycle_length` None is an endless cycle: constant f_max.
    """

    warm_up_steps: int = 100
    f_start: float = 1e-6
    f_max: float = 1.0
    f_min: float = 1.0
    cycle_length: int | None = None

    def __post_init__(self) -> None:
        if self.warm_up_steps < 0:
            raise ConfigError(f"scheduler.warm_up_steps={self.warm_up_steps} must be >= 0")
        if self.cycle_length is not None and self.cycle_length <= self.warm_up_steps:
            raise ConfigError(f"scheduler.cycle_length={self.cycle_length} must exceed scheduler.warm_up_steps={self.warm_up_steps}")

    def factor(self, update: int) -> float:
        """Factor of update `update` >= 0."""
        if update < self.warm_up_steps:
            return self.f_start + (self.f_max - self.f_start) * update / self.warm_up_steps
        if self.cycle_length is None:
            return self.f_max
        done = min((update - self.warm_up_steps) / (self.cycle_length - self.warm_up_steps), 1.0)
        return self.f_max + (self.f_min - self.f_max) * done
