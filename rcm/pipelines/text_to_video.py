"""Sampling a whole video at once with a bidirectional network: the many-step teacher, or the
few-step rCM student.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rcm.core.errors import ConfigError
from rcm.core.records import Record
from rcm.nets.condition import Condition
from rcm.nets.denoiser import VelocityModel
from rcm.nets.layout import TokenLayout
from rcm.rollout.autoregressive import time_tensor
from rcm.samplers.bidirectional import Sampler, SingleStep
from rcm.samplers.schedule import shifted_grid, trig_grid
from rcm.samplers.steps import ConsistencyStep, EulerStep, StepRule
from rcm.samplers.unipc import UniPC

SOLVERS = {"ode": ("euler", "unipc"), "rcm_few_step": ("consistency", "euler")}
"""Kind of a recipe -> the solvers that walk its grid, the usual one first."""


@dataclass(frozen=True)
class WholeVideoRecipe(Record):
    """Sampling of a bidirectional network; the counterpart of `SamplingRecipe`.

    kind "ode": along the grid of `steps`, `shift` and `sigma_max` from unscaled noise
    (docs/reference/sampling.md#many-steps), `solver` "euler" or "unipc" (order 2). kind
    "rcm_few_step": along the TrigFlow grid of `sigma_max`, from noise scaled to its first time
    (docs/reference/sampling.md#few-steps), `solver` "consistency" or, deterministic, "euler";
    `shift` is unused. `solver` None: the first of each. Raises `ConfigError` for an impossible grid
    or pairing.
    """

    kind: Literal["ode", "rcm_few_step"]
    sigma_max: float
    steps: int
    shift: float = 1.0
    guidance: float = 1.0
    solver: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver is not None and self.solver not in SOLVERS[self.kind]:
            raise ConfigError(
                f"solver {self.solver!r} does not walk the grid of {self.kind!r} sampling; choose"
                f" {' or '.join(map(repr, SOLVERS[self.kind]))}"
            )
        self.sampler()

    def times(self) -> tuple[float, ...]:
        """RF times walked, decreasing to 0."""
        if self.kind == "ode":
            return shifted_grid(self.steps, shift=self.shift, sigma_max=self.sigma_max)
        return trig_grid(self.steps, sigma_max=self.sigma_max)

    def sampler(self) -> Sampler:
        """The solver on its grid."""
        times, scaled = self.times(), self.kind == "rcm_few_step"
        solver = self.solver or SOLVERS[self.kind][0]
        if solver == "unipc":
            return UniPC(times)
        rules: dict[str, type[StepRule]] = {"euler": EulerStep, "consistency": ConsistencyStep}
        return SingleStep(times, rules[solver](), scale_first=scaled)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WholeVideoRecipe:
        """From the mapping in a checkpoint's description; unknown or missing keys raise
        `ConfigError`.
        """
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        missing = sorted({"kind", "sigma_max", "steps"} - set(data))
        if unknown or missing:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(
                f"whole-video sampler has unknown keys {unknown} and lacks {missing}; known:"
                f" {known}"
            )
        return cls(**data)


def check_guided(*, shift: float, guidance: float) -> None:
    """`ConfigError` naming the flag unless the shift is positive and both numbers are finite."""
    if not 0 < shift < math.inf:
        raise ConfigError(f"--timestep_shift {shift:g} must be positive and finite (1: no shift)")
    if not math.isfinite(guidance):
        raise ConfigError(
            f"--guidance_scale {guidance:g} is no scale; give a finite number (1: no guidance)"
        )


@torch.no_grad()
def walk(
    denoiser: VelocityModel,
    cond: Condition,
    recipe: WholeVideoRecipe,
    noise: torch.Tensor,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """x0 of unit `noise` [B, C, T, h, w], in its dtype (use float64), all frames attending to each
    other; `generator` draws what the solver adds.
    """
    layout = TokenLayout.bidirectional(noise.shape[2], grid=denoiser.token_grid(*noise.shape[3:]))

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return denoiser.velocity(x, time_tensor(t, x.shape[0], x.device), cond, layout)

    return recipe.sampler().sample(velocity, noise, generator=generator)


def whole_latents(
    denoiser: VelocityModel,
    cond: Condition,
    recipe: WholeVideoRecipe,
    *,
    shape: tuple[int, int, int, int, int],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """x0 [B, C, T, H, W] float32 of `shape` by `walk`, its noise drawn in float32."""
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    noise = noise.to(device, torch.float64)
    return walk(denoiser, cond, recipe, noise, generator=generator).float()
