"""Training-time laws of RF time, per video or per block (Causal_rCM.md sections 1, 3, 4).

Every draw is float64 on the device of its generator, and lies in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import Record, check_kinds, within
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.time import check_shift, shift_time, unshift_time

BlockStrategy = Literal["random", "same", "fopp"]


class TimeLaw(Protocol):
    """A distribution of RF time with its cumulative function and the inverse of it."""

    def sample(self, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
        """Independent float64 draws in [0, 1]."""

    def cdf(self, t_rf: Tensor) -> Tensor:
        """P(time <= t_rf), elementwise."""

    def icdf(self, u: Tensor) -> Tensor:
        """The time with cdf u, elementwise, u in [0, 1]."""


@dataclass(frozen=True)
class LogNormal:
    """t = sigma / (1 + sigma) with log sigma ~ N(p_mean, p_std^2), p_std > 0."""

    p_mean: float
    p_std: float

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.p_std > 0:
            raise ConfigError(f"LogNormal needs p_std > 0, got p_std={self.p_std}")

    def sample(self, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
        """sigmoid(p_mean + p_std z) with z standard normal."""
        z = torch.randn(
            tuple(shape), generator=generator, device=generator.device, dtype=torch.float64
        )
        return torch.sigmoid(self.p_mean + self.p_std * z)

    def cdf(self, t_rf: Tensor) -> Tensor:
        """Phi((logit t - p_mean) / p_std); 0 at t = 0 and 1 at t = 1."""
        return torch.special.ndtr((torch.logit(t_rf) - self.p_mean) / self.p_std)

    def icdf(self, u: Tensor) -> Tensor:
        """sigmoid(p_mean + p_std Phi^-1(u))."""
        return torch.sigmoid(self.p_mean + self.p_std * torch.special.ndtri(u))


@dataclass(frozen=True)
class UniformShift:
    """u ~ U[0, 1) and t = shift(u) (`time.shift_time`); shift <= 0 means no shift."""

    shift: float

    def __post_init__(self) -> None:
        check_kinds(self)
        check_shift(self.shift)

    def sample(self, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
        """shift_time(u)."""
        u = torch.rand(
            tuple(shape), generator=generator, device=generator.device, dtype=torch.float64
        )
        return self.icdf(u)

    def cdf(self, t_rf: Tensor) -> Tensor:
        """unshift_time(t)."""
        return unshift_time(t_rf, self.shift)

    def icdf(self, u: Tensor) -> Tensor:
        """shift_time(u), clamped to [0, 1]."""
        return shift_time(u, self.shift).clamp(0.0, 1.0)


@dataclass(frozen=True)
class TimeLawConfig(Record):
    """Which law, and its numbers."""

    # `LogNormal` reads p_mean and p_std, `UniformShift` shift
    law: Literal["lognormal", "uniform_shift"] = "lognormal"
    p_mean: float = within(-0.8, least=-100, most=100)  # mean of log sigma
    p_std: float = within(1.6, most=100)  # standard deviation of log sigma
    shift: float = 5.0  # s, in 0.001 to 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        name, value = ("p_std", self.p_std) if self.law == "lognormal" else ("shift", self.shift)
        if not value > 0:
            raise ConfigError(f"{name}={value} must be positive")
        if name == "shift":
            check_shift(value)

    def build(self) -> TimeLaw:
        """The law itself."""
        if self.law == "lognormal":
            return LogNormal(self.p_mean, self.p_std)
        return UniformShift(self.shift)


@dataclass(frozen=True)
class ConsistencyGrid:
    """Adjacent times of discrete consistency: steps of 1/num_steps in unshifted time, random phase.

    `skip` teacher steps, 1 to num_steps, separate student and target (Causal_rCM.md section 4).
    Bidirectional shift 5, causal 3; both num_steps 48, skip 1.
    """

    num_steps: int = 48
    skip: int = 1
    shift: float = 5.0

    def __post_init__(self) -> None:
        check_kinds(self)
        check_shift(self.shift)
        if not 1 <= self.skip <= self.num_steps:
            raise ConfigError(
                f"dcm_skipping_interval_steps={self.skip} must lie in 1..{self.num_steps}"
                f" (dcm_total_steps={self.num_steps})"
            )

    def sample(self, batch: int, *, generator: torch.Generator) -> Tensor:
        """Float64 [B, skip + 1], falling: first the student's time, last the target's, >= 0."""
        phase = torch.rand(
            (batch, 1), generator=generator, device=generator.device, dtype=torch.float64
        )
        return self.times((1 - self.skip / self.num_steps) * phase)

    def times(self, u: Tensor) -> Tensor:
        """shift(1 - (u + k / num_steps)), k = 0..skip, of phases u [B, 1]: [B, skip + 1]."""
        if u.dim() != 2 or u.shape[1] != 1:
            raise ValueError(f"phase u has shape {tuple(u.shape)}, expected [B, 1]")
        k = torch.arange(self.skip + 1, device=u.device, dtype=u.dtype)
        return shift_time(1 - (u + k / self.num_steps), self.shift)


def block_times(
    law: TimeLaw,
    *,
    strategy: BlockStrategy,
    batch: int,
    pattern: BlockPattern,
    num_frames: int,
    generator: torch.Generator,
) -> Tensor:
    """RF times of every frame, float64 [batch, num_frames], constant inside a block (Causal_rCM.md
    section 3).

    "same": one draw of `law` per video. "random": one per block, independent. "fopp"
    (frame-oriented probability propagation, after SkyReels-V2 and AR-Diffusion): non-decreasing
    over blocks; a uniformly chosen anchor block follows `law`, blocks before it are sorted draws of
    `law` conditioned below the anchor's time, blocks after it sorted draws conditioned above.
    Raises `ConfigError` on another strategy or a pattern that does not fit.
    """
    num_blocks = pattern.num_blocks(num_frames)
    if strategy == "same":
        times = law.sample((batch, 1), generator=generator).expand(batch, num_blocks)
    elif strategy == "random":
        times = law.sample((batch, num_blocks), generator=generator)
    elif strategy == "fopp":
        times = _fopp(law, batch=batch, num_blocks=num_blocks, generator=generator)
    else:
        raise ConfigError(
            f"df_timestep_strategy={strategy!r} is unknown; choose from random, same, fopp"
        )
    return times[:, list(pattern.block_of_frame(num_frames))]


def _fopp(law: TimeLaw, *, batch: int, num_blocks: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    anchor = torch.randint(num_blocks, (batch, 1), generator=generator, device=device)
    t_anchor = law.sample((batch, 1), generator=generator)
    u_anchor = law.cdf(t_anchor)
    before = _sorted_uniforms(anchor, width=num_blocks, generator=generator)
    after = _sorted_uniforms(num_blocks - 1 - anchor, width=num_blocks, generator=generator)

    block = torch.arange(num_blocks, device=device).expand(batch, num_blocks)
    after = after.gather(1, (block - anchor - 1).clamp_min(0))
    # Clamping to the anchor only removes rounding of icdf(cdf(.)): the order of the blocks is
    # exact.
    left = torch.minimum(law.icdf(u_anchor * before), t_anchor)
    right = torch.maximum(law.icdf(u_anchor + (1 - u_anchor) * after), t_anchor)
    return torch.where(block < anchor, left, torch.where(block > anchor, right, t_anchor))


def _sorted_uniforms(count: Tensor, *, width: int, generator: torch.Generator) -> Tensor:
    """Row b: `count[b]` < width sorted uniforms on (0, 1), then ones; count [B, 1].

    They are partial sums of count + 1 exponential draws over the total of these.
    """
    uniform = torch.rand(
        (count.shape[0], width), generator=generator, device=generator.device, dtype=torch.float64
    )
    sums = (-torch.log1p(-uniform)).cumsum(1)
    total = sums.gather(1, count)
    return (sums / total.clamp_min(math.ulp(0.0))).clamp_max(1.0)
