"""Exponential moving averages with a power-function profile, kept on local shards.

The profile (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv 2312.02696, eq. 1) weights the weights of update tau by tau^gamma; its width relative to the
training length, `std`, stays constant as training goes on. The exponent gamma and std determine
each other:

    std(gamma) = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))                           (eq. 123)
    gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + (12 - std^-2) = 0, its largest real root    (eq.
                                                                                            126)
    beta_i = (1 - 1/(i + 1))^(gamma + 1), a copy for i < 1                                  (eq. 127
                                                                                            with one
                                                                                            update
                                                                                            per unit
                                                                                            of time)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.parallel.fsdp import local, stored_parameters
from rcm.parallel.host import passing, sharded_like, zeros_on_host
from rcm.train.kept_adamw import buckets_of


def exponent_to_std(exponent: float) -> float:
    """Relative width of the profile tau^exponent, exponent > -1 (eq. 123)."""
    if exponent <= -1:
        raise ConfigError(f"EMA exponent {exponent} must be greater than -1")
    return math.sqrt(exponent + 1) / ((exponent + 2) * math.sqrt(exponent + 3))


def std_to_exponent(std: float) -> float:
    """Exponent of the profile of relative width `std`, 0 < std < 1/sqrt(12) = 0.2887 (the uniform
    average, exponent 0) (eq. 126).
    """
    if not 0 < std < 12**-0.5:
        raise ConfigError(f"the width {std} of an average must lie in (0, {12**-0.5:.4f})")
    precision = std**-2
    roots = np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-8 * max(1.0, abs(root))))


@dataclass(frozen=True, kw_only=True)
class EMAConfig(Record):
    """The average of the student's weights (docs/reference/training.md#optimiser-and-ema)."""

    enabled: bool = True  # keep and evaluate averaged weights
    rate: float = 0.1  # relative width std of the profile, in (0, 0.288)
    # added to the student's update index before beta is computed
    iteration_shift: int = within(0, least=0, most=10**12)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enabled and not 0 < self.rate < 12**-0.5:
            raise ConfigError(
                f"rate={self.rate} must be in (0, {12**-0.5:.3f}), the widths a power-function"
                " average can have"
            )
        if self.enabled and self.rate < 1e-6:
            raise ConfigError(
                f"rate={self.rate} must be at least 1e-06, where an average is the last weights"
            )


class PowerEMA:
    """Average of a network's parameters; `shadow` maps parameter names to fp32 (or wider) tensors
    sharded as the parameters are. `host`: they live in host memory and pass through the device when
    they are updated.
    """

    def __init__(self, net: nn.Module, config: EMAConfig, *, host: bool = False) -> None:
        self.config, self.host = config, host
        self.exponent = std_to_exponent(config.rate)
        copied = _on_host if host else _wide
        self.shadow: dict[str, Tensor] = {
            name: copied(p.detach()) for name, p in stored_parameters(net).items()
        }

    def beta(self, index: int) -> float:
        """Weight of the old average at the student's effective update `index` (0-based); 0 while
        index + iteration_shift < 1.
        """
        i = index + self.config.iteration_shift
        return 0.0 if i < 1 else (1.0 - 1.0 / (i + 1)) ** (self.exponent + 1.0)

    @torch.no_grad()
    def update(self, net: nn.Module, *, index: int) -> None:
        """shadow <- beta shadow + (1 - beta) parameters, after the student's update `index`."""
        parameters, beta = stored_parameters(net), self.beta(index)
        if not self.host:
            shadow = [local(self.shadow[name]) for name in parameters]
            self._move(shadow, list(parameters.values()), beta)
            return
        names = {id(p): name for name, p in parameters.items()}
        buckets = buckets_of(list(parameters.values()))
        groups = [[local(self.shadow[names[id(p)]]) for p in bucket] for bucket in buckets]
        device = local(buckets[0][0]).device
        passing(groups, lambda i, here: self._move(here, buckets[i], beta), device=device)

    @staticmethod
    def _move(shadow: list[Tensor], parameters: list[Tensor], beta: float) -> None:
        current = [local(p).to(s.dtype) for p, s in zip(parameters, shadow, strict=True)]
        if beta == 0.0:
            torch._foreach_copy_(shadow, current)
        else:
            torch._foreach_lerp_(shadow, current, 1.0 - beta)

    def write_to(self, net: nn.Module) -> None:
        """`net` takes the averaged weights, rounded to its dtype."""
        self._fill(net, self.shadow)

    @contextmanager
    def swapped(self, net: nn.Module) -> Iterator[None]:
        """Within the context `net` computes with the averaged weights (rounded to its dtype);
        afterwards its own are back, bit by bit.
        """
        kept = {name: local(p.detach()).clone() for name, p in stored_parameters(net).items()}
        try:
            self._fill(net, self.shadow)
            yield
        finally:
            self._fill(net, kept)

    @staticmethod
    @torch.no_grad()
    def _fill(net: nn.Module, values: dict[str, Tensor]) -> None:
        for name, p in stored_parameters(net).items():
            local(p.detach()).copy_(local(values[name]))


def _wide(parameter: Tensor) -> Tensor:
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def _on_host(parameter: Tensor) -> Tensor:
    shard = local(parameter)
    wide = torch.empty_like(
        shard, dtype=torch.promote_types(shard.dtype, torch.float32), device="meta"
    )
    return sharded_like(zeros_on_host(wide, pinned=shard.is_cuda).copy_(shard), parameter)
