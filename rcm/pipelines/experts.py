"""Networks that take over from each other as the time falls, each on the device while it is in
charge, and the record of the steps they make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import pairwise

from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, guided
from rcm.nets.layout import TokenLayout
from rcm.nets.paired_cache import Past
from rcm.nets.velocity_model import VelocityModel
from rcm.pipelines.image_condition import MASK_CHANNELS
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import Idle, Resident


@dataclass(frozen=True)
class Expert:
    """A network, and the RF time down to which it is in charge (0 for the only or the last one)."""

    name: str
    network: Resident[Denoiser]
    down_to: float = 0.0


@dataclass(frozen=True)
class Step:
    """One network evaluation as it was made: its number from 0, RF time, the expert in charge,
    seconds of its forwards alone.
    """

    index: int
    t: float
    expert: str
    seconds: float


OnStep = Callable[[Step, int], None]
"""Called after every step with the step and their number in all."""


def require_descending(experts: Sequence[Expert]) -> None:
    """`ConfigError` unless the experts' times descend to 0."""
    bounds = [expert.down_to for expert in experts]
    if not bounds or bounds[-1] != 0 or any(not 0 <= b < a for a, b in pairwise([1.0, *bounds])):
        raise ConfigError(
            "experts must be in charge down to decreasing times below 1 that end at 0, got"
            f" {bounds}; change --boundary"
        )


@dataclass(eq=False)
class Switched(VelocityModel):
    """The expert in charge at a time, guided with `negative` where `scale` asks for it; for whole
    videos along `times`. Whoever takes over prepares the conditions for itself; then nothing is
    left of its predecessor, which rests as `idle` says. `steps`: what was evaluated.
    """

    experts: Sequence[Expert]
    negative: Condition | None
    scale: float
    _: KW_ONLY
    times: Sequence[float]
    clock: PartClock
    idle: Idle
    on_step: OnStep | None = None
    steps: list[Step] = field(default_factory=list, init=False)
    _number: int = field(default=-1, init=False)
    _model: VelocityModel | None = field(default=None, init=False)
    _prepared: tuple[Condition, Condition] | None = field(default=None, init=False)

    def velocity(
        self, x: Tensor, t: Tensor, cond: Condition, layout: TokenLayout, *, cache: Past = None
    ) -> Tensor:
        """See `VelocityModel`; one time for all samples and frames."""
        time, clock = float(t[0, 0]), self.clock
        model = self._in_charge(time)
        prepared = self._ready(model, cond, channels=x.shape[1])
        before = clock.seconds.get("network", 0.0)
        with clock.part("network"):
            v = model.velocity(x, t, prepared.expand(x.shape[0]), layout, cache=cache)
        spent = clock.seconds["network"] - before
        self.steps.append(Step(len(self.steps), time, self.experts[self._number].name, spent))
        if self.on_step is not None:
            self.on_step(self.steps[-1], len(self.times) - 1)
        return v

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """See `VelocityModel`."""
        return self._in_charge(self.times[0]).token_grid(height, width)

    def _in_charge(self, time: float) -> VelocityModel:
        number = next(i for i, expert in enumerate(self.experts) if time >= expert.down_to)
        if number != self._number or self._model is None:
            # the last references to the expert in charge and to what it made of the prompts
            self._model = self._prepared = None
            for other in (*self.experts[:number], *self.experts[number + 1 :]):
                other.network.rest(self.idle)
            self._number, denoiser = number, self.experts[number].network.use()
            with self.clock.part("network"):
                away = self.negative
                negative = None if away is None else partial(denoiser.prepare, away)
                self._model = guided(denoiser, negative, self.scale)
        return self._model

    def _ready(self, model: VelocityModel, cond: Condition, *, channels: int) -> Condition:
        if self._prepared is None or self._prepared[0] is not cond:
            expert = self.experts[self._number]
            require_task(expert.network.use(), cond, channels=channels, name=expert.name)
            with self.clock.part("network"):
                self._prepared = cond, model.prepare(cond)
        return self._prepared[1]


def require_task(denoiser: Denoiser, cond: Condition, *, channels: int, name: str) -> None:
    """`ConfigError` for a text-to-video network that is given an image, or the other way round."""
    if not isinstance(denoiser, Denoiser):
        return
    config = denoiser.net.config
    given = channels + (0 if cond.concat is None else cond.concat.shape[1])
    if config.in_dim != given:
        raise ConfigError(
            f"the network {name} reads {config.in_dim} channels, {given} are given ({channels} of"
            " noise, the others of an image): it was made for another task (16 text-to-video, 36"
            " image-to-video); give another file"
        )
    if config.image_branch != (cond.image is not None):
        has = (
            "has an image branch (Wan2.1 image-to-video) and needs the CLIP encoder"
            if config.image_branch
            else "has no image branch"
        )
        raise ConfigError(
            f"the network {name} {has}; WanPipeline(clip=...) decides whether it is given image"
            " tokens"
        )
    ends = (
        cond.concat is not None
        and cond.concat.shape[2] > 1
        and bool(cond.concat[0, MASK_CHANNELS - 1, -1].any())
    )
    if ends != bool(config.image_positions):
        made = (
            "a first and a last frame (Wan2.1 FLF2V)"
            if config.image_positions
            else "a first frame alone"
        )
        raise ConfigError(
            f"the network {name} was made for {made}, {'both are' if ends else 'one is'} given"
            " (--last_image_path)"
        )
