"""The options of sampling, in one table for all commands: what they take, and the field of a recipe
that they fill. They are laid over the recipe that holds where none is given: that which a
checkpoint was trained for, or the release's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rcm.core.errors import ConfigError
from rcm.inference.flag_table import add_flags
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.schedule import parse_schedules, parse_times


@dataclass(frozen=True)
class Option:
    """An option of sampling: its `kind` in a table of flags; the field of a `SamplingRecipe` that
    it fills, and of a `WholeVideoRecipe`; the steps that it belongs to. Its range is in `RANGES`.
    """

    kind: str = ""
    causal: str = ""
    whole: str = ""
    steps: Literal["few", "many"] | None = None


OPTIONS = {
    "distilled": Option(),
    "first_chunk_t": Option("N"),
    "chunk_t": Option("N"),
    "num_steps": Option("N", "ode_steps", "steps"),
    "sigma_max": Option("float", "sigma_max", "sigma_max"),
    "steps_per_chunk": Option("N...", steps="few"),
    "mid_t": Option("T...", steps="few"),
    "mid_t_schedules": Option("T,T;T", steps="few"),
    "guidance_scale": Option("float", "guidance", "guidance", steps="many"),
    "timestep_shift": Option("float", "shift", "shift", steps="many"),
    "negative_prompt": Option("TEXT", steps="many"),
    "context_from_last_step": Option("", "noisy_context"),
    "context_from_last_step_start_chunk": Option("N", "noisy_context_start_chunk"),
    "ignore_recipe": Option(),
}
"""Name -> option. `SamplingRecipe.pattern` is of two, its `mids` of the few-step ones."""

KINDS = {name: option.kind for name, option in OPTIONS.items()}
FEW, MANY = (
    tuple(name for name, option in OPTIONS.items() if option.steps == steps)
    for steps in ("few", "many")
)
CONTEXT = ("context_from_last_step", "context_from_last_step_start_chunk")
EITHER: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": None}
"""A switch that may also be turned off, for `add_flags`."""

_TOLD = """
steps_per_chunk         steps of the first, second, ... chunk; the last number repeats
  (4 2: four, then two)
mid_t_schedules         times between the steps, for each number of --steps_per_chunk; fractions
  allowed ("15/16,5/6,5/8;5/6")
num_steps               steps of every chunk, or of a whole video
context_from_last_step  noisy context: cache the keys and values of a chunk's last step, without
  another pass over the clean chunk
context_from_last_step_start_chunk  first chunk cached with noisy context
sigma_max               noise level of the first step
timestep_shift          shift of the many-step grid
guidance_scale          classifier-free guidance; 1 or less: none
ignore_recipe           sample even if the checkpoint was not trained for these settings
"""


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a checkpoint that describes itself; every default means "as trained"."""
    group = parser.add_argument_group("sampling", "Defaults: as the checkpoint was trained.")
    add_flags(group, _TOLD, KINDS, context_from_last_step=EITHER)


def refuse(flags: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """`ConfigError` "--a, --b WHY" for those of `names` that were given, or turned off."""
    values = {name: getattr(flags, name, None) for name in names}
    given = [f"--{name}" for name, v in values.items() if v not in (None, "")]
    if given:
        raise ConfigError(f"{', '.join(given)} {why}")


def check_pairs(flags: argparse.Namespace, *, noisy_context: bool = False) -> None:
    """`ConfigError` for options that need another, or exclude it; `noisy_context`: where nothing
    is said of it.
    """
    if flags.num_steps is not None and flags.steps_per_chunk is not None:
        raise ConfigError(
            "--num_steps and --steps_per_chunk both set the number of steps; give one of them"
        )
    if flags.mid_t_schedules and flags.steps_per_chunk is None:
        raise ConfigError(
            "--mid_t_schedules needs --steps_per_chunk with one step count per schedule, and was"
            " given without --steps_per_chunk"
        )
    said, start = flags.context_from_last_step, flags.context_from_last_step_start_chunk
    if start is not None and not (noisy_context if said is None else said):
        raise ConfigError(
            "--context_from_last_step_start_chunk has no effect with clean context; add"
            " --context_from_last_step"
        )


def chosen_recipe(
    flags: argparse.Namespace, trained: SamplingRecipe | WholeVideoRecipe
) -> SamplingRecipe | WholeVideoRecipe:
    """A recipe with the flags laid over it. Raises `ConfigError` for flags that have no meaning for
    it.
    """
    if flags.timestep_shift is not None and trained.kind != "ode":
        raise ConfigError(
            "--timestep_shift belongs to many-step sampling; the checkpoint is sampled with"
            f" {trained.kind!r} steps"
        )
    if isinstance(trained, SamplingRecipe):
        check_pairs(flags, noisy_context=trained.noisy_context)
        return laid_over(flags, trained)
    told = "belong to causal checkpoints; this one is bidirectional and samples whole videos"
    refuse(flags, (*FEW, *CONTEXT), told)
    return laid_over_whole(flags, trained)


def laid_over_whole(flags: argparse.Namespace, base: WholeVideoRecipe) -> WholeVideoRecipe:
    """`base` with the flags that were given."""
    return replace(base, **_filled(flags, {n: option.whole for n, option in OPTIONS.items()}))


def laid_over(flags: argparse.Namespace, base: SamplingRecipe) -> SamplingRecipe:
    """`base` with the flags of a causal network that were given; `check_pairs` comes before."""
    changes = _filled(flags, {name: option.causal for name, option in OPTIONS.items()})
    mids, steps = getattr(flags, "mid_t", None), flags.steps_per_chunk
    if base.kind != "ode":
        number = changes.pop("ode_steps", None if mids is None else len(base.mids[0]) + 1)
        steps = [number] if steps is None and number is not None else steps
    if steps is not None:
        schedules = parse_schedules(flags.mid_t_schedules or "")
        if mids is not None and not schedules:
            schedules = (parse_times(mids),) * len(steps)
        knob = "--num_steps" if flags.steps_per_chunk is None else "--steps_per_chunk"
        base = base.with_steps(*steps, schedules=schedules, knob=knob)
    return replace(base, **changes)


def _filled(flags: argparse.Namespace, fields: Mapping[str, str]) -> dict[str, Any]:
    """Field -> value of the flags that were given."""
    found = {field: getattr(flags, name) for name, field in fields.items() if field}
    return {field: value for field, value in found.items() if value is not None}
