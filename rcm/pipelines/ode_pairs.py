"""Trajectories of a teacher's probability-flow ODE, the data of TF-KD and DF-KD
(docs/reference/training.md#ode-pairs).

A bidirectional teacher walks whole videos from noise, a causal one all blocks at once, each under
the clean data before it. Sample i depends on its number and the seed alone, whatever the batch
size, the rank, or what was built before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.rng import generator, randn, require_seed
from rcm.data.loader import Source
from rcm.data.shard_writer import ShardSample, require_finite
from rcm.diffusion.time import shift_time, unshift_time
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import guided
from rcm.nets.layout import TokenLayout
from rcm.pipelines.from_checkpoint import LoadedModel
from rcm.rollout.autoregressive import time_tensor
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.schedule import CAUSAL_MID_TIMES, initial_time
from rcm.samplers.steps import EulerStep

KD_TIMES = (1.0, *CAUSAL_MID_TIMES)
"""RF times of the stored states; the default of model.config.kd_timesteps."""

_SAME_TIME = 1e-6
_MOST_STEPS = 100_000
_SHIFTS = (1e-3, 1e3)
_MOST_GUIDANCE = 1e3

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v for x [B, C, T, H, W] float64 at RF times [B, 1] float64."""


@dataclass(frozen=True)
class TrajectoryPlan:
    """Which states of the ODE are kept, and how it is walked.

    `times`: RF times of the kept states, strictly decreasing in (0, 1]. `steps`, `shift`,
    `sigma_max`: the sampler's, see `grid`. `guidance`: scale, above 1 with the negative prompt.
    `seed`: of the noise. `ConfigError` for impossible ones.
    """

    times: tuple[float, ...]
    steps: int
    shift: float
    sigma_max: float
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(times=self.times, shift=self.shift, guidance=self.guidance)
        if not 1 <= self.steps <= _MOST_STEPS:
            raise ConfigError(f"steps={self.steps} must be in 1 to {_MOST_STEPS}; change --steps")
        require_seed(self.seed, knob="--seed")
        self.grid()

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        *,
        times: Sequence[float] = KD_TIMES,
        steps: int | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> TrajectoryPlan:
        """Steps, shift and guidance of the checkpoint's own sampler where None. `ConfigError` for a
        few-step student: it has no ODE.
        """
        trained = model.trained_recipe
        if trained.kind != "ode":
            raise ConfigError(
                f"{model.source} is a few-step student ({trained.kind!r}, stage"
                f" {model.description.stage}), which has no ODE to follow; choose a diffusion"
                " teacher for --teacher"
            )
        own_steps = trained.ode_steps if isinstance(trained, SamplingRecipe) else trained.steps
        return cls(
            times=tuple(times),
            steps=own_steps if steps is None else steps,
            shift=trained.shift if shift is None else shift,
            sigma_max=trained.sigma_max,
            guidance=trained.guidance if guidance is None else guidance,
            seed=seed,
        )

    def grid(self) -> tuple[float, ...]:
        """Times walked, decreasing to 0: `steps` shifted steps, united with `times`, which are in
        it exactly.

        Unit noise stands at the first of them: the sampler's first time, or `times[0]` if that is
        later (1, by default).
        """
        start = unshift_time(max(initial_time(self.sigma_max), self.times[0]), self.shift)
        points = (
            shift_time(start * (self.steps - k) / self.steps, self.shift)
            for k in range(self.steps + 1)
        )
        between = {p for p in points if all(abs(p - t) > _SAME_TIME for t in self.times)}
        return tuple(sorted(between.union(self.times), reverse=True))


def check_numbers(
    *, times: Sequence[float], shift: float | None = None, guidance: float | None = None
) -> None:
    """`ConfigError` naming the flag for numbers that no trajectory can be walked with; None is the
    teacher's own.
    """
    if not times or not all(0 < t <= 1 for t in times):
        raise ConfigError(
            f"trajectory times {list(times)} must be RF times in (0, 1], one or more; change"
            " --times"
        )
    for before, later in pairwise(times):
        if later >= before:
            raise ConfigError(
                f"trajectory times must decrease strictly, got {later:g} after {before:g}; change"
                " --times"
            )
    if shift is not None and not _SHIFTS[0] <= shift <= _SHIFTS[1]:
        raise ConfigError(
            f"shift={shift:g} must be in {_SHIFTS[0]:g} to {_SHIFTS[1]:g} (1: no shift); change"
            " --shift"
        )
    if guidance is not None and not abs(guidance) <= _MOST_GUIDANCE:
        raise ConfigError(
            f"guidance={guidance:g} must be a number up to {_MOST_GUIDANCE:g} (1: no guidance);"
            " change --guidance"
        )


@torch.no_grad()
def walk(velocity: Velocity, noise: Tensor, plan: TrajectoryPlan) -> Tensor:
    """Trajectory [B, 1 + K, C, T, H, W] float32 from unit noise [B, C, T, H, W]: index 0 the clean
    end, index k the state at times[k - 1].

    Euler in float64.
    """
    x, rule, kept = noise.double(), EulerStep(), []
    for t, t_next in pairwise(plan.grid()):
        if t in plan.times:
            kept.append(x.float())
        x = rule(x, velocity(x, time_tensor(t, x.shape[0], x.device)), t=t, t_next=t_next)
    return torch.stack([x.float(), *kept], dim=1)


def numbered_noise(shape: Sequence[int], numbers: Iterable[int], *, seed: int) -> Tensor:
    """Unit noise [B, *shape] float32 on the CPU; a row is a function of its sample's number and the
    seed.
    """
    streams = (
        generator(seed=seed, step=number, dp_rank=0, purpose="ode_pairs") for number in numbers
    )
    return torch.stack([randn(shape, generator=stream) for stream in streams])


class ODEPairBuilder:
    """Samples of a trajectory data set, of one teacher.

    A bidirectional teacher needs `prompts`, a causal one `latents`, a `Source` of data of the
    checkpoint's shape, with their embeddings; `ConfigError` otherwise. Sample i takes prompt or
    video i modulo their number, and always its own noise.
    """

    def __init__(
        self,
        model: LoadedModel,
        plan: TrajectoryPlan,
        *,
        prompts: Sequence[str] | None = None,
        latents: Source | None = None,
    ) -> None:
        check_inputs(model, prompts=prompts is not None, latents=latents is not None)
        self.model, self.plan, self._prompts, self._latents = model, plan, prompts, latents
        self._forcing = None if model.recipe is None else TeacherForcing(model.recipe.blocks)
        if self._forcing is not None:
            self._forcing.pattern.bounds(model.latent_shape[1])  # raises where blocks do not fit
        self._teacher = guided(model.denoiser, lambda: model.negative, plan.guidance)

    def samples(
        self, start: int, stop: int, *, batch: int, dtype: torch.dtype
    ) -> Iterator[ShardSample]:
        """Samples start .. stop - 1, computed `batch` at a time, stored as `dtype`."""
        if batch < 1:
            raise ConfigError(f"batch={batch} must be at least 1; change --batch")
        for first in range(start, stop, batch):
            yield from self._batch(range(first, min(first + batch, stop)), dtype)

    def _batch(self, numbers: range, dtype: torch.dtype) -> Iterator[ShardSample]:
        prompts, text, context = self._inputs(numbers)
        cond = self.model.denoiser.prepare(Condition(text.to(self.model.device)))
        noise = numbered_noise(self.model.latent_shape, numbers, seed=self.plan.seed).to(
            self.model.device
        )
        states = walk(self._velocity(cond, context), noise, self.plan).to("cpu", dtype)
        require_finite(
            states,
            numbers,
            what="trajectories",
            knob="look at the teacher's weights and precision, or lower --guidance",
        )
        contexts = [None] * len(prompts) if context is None else context.to(dtype)
        yield from map(ShardSample, states, text.to(dtype), prompts, contexts)

    def _inputs(self, numbers: range) -> tuple[list[str], Tensor, Tensor | None]:
        """Prompts, their embeddings, and the data's latents for a causal teacher."""
        if self._latents is not None:
            data = self._latents.fetch([number % len(self._latents) for number in numbers])
            return data.prompts, data.text, data.latents
        assert self._prompts is not None
        prompts = [self._prompts[number % len(self._prompts)] for number in numbers]
        return prompts, self.model.text.encode(prompts).cpu(), None

    def _velocity(self, cond: Condition, context: Tensor | None) -> Velocity:
        forcing, teacher = self._forcing, self._teacher
        if forcing is None or context is None:
            _, frames, height, width = self.model.latent_shape
            layout = TokenLayout.bidirectional(frames, grid=teacher.token_grid(height, width))
            return lambda x, t: teacher.velocity(x, t, cond, layout)
        clean = forcing.clean(context.to(self.model.device))
        return lambda x, t: forcing.velocity(teacher, x, t, cond, context=clean)


def check_inputs(model: LoadedModel, *, prompts: bool, latents: bool) -> None:
    """`ConfigError` unless what is given is what this teacher's trajectories start from."""
    stage = f"{model.source} (stage {model.description.stage})"
    if model.recipe is None and latents:
        raise ConfigError(
            f"{stage} is bidirectional: its trajectories start from noise and prompts; leave out"
            " --latents"
        )
    if model.recipe is not None and not latents:
        raise ConfigError(
            f"{stage} is causal ({model.recipe.pattern}): its trajectories run under clean data;"
            " give --latents PATTERN, its shards"
        )
    if model.recipe is not None and prompts:
        raise ConfigError(f"{stage} is causal: prompts come with the latents; leave out --prompts")
    if model.recipe is None and not prompts:
        raise ConfigError(f"{stage} is bidirectional: its trajectories need prompts")
