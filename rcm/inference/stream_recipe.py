"""Sampling flags of the streaming command line, laid over what the checkpoint was trained for."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from rcm.core.errors import ConfigError
from rcm.inference.flag_table import add_flags
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.schedule import parse_schedules

_CONTEXT = {
    "context_from_last_step": "noisy_context",
    "context_from_last_step_start_chunk": "noisy_context_start_chunk",
}
_GRID = {"sigma_max": "sigma_max", "timestep_shift": "shift", "guidance_scale": "guidance"}
"""Flags and the fields of a recipe that they set."""


_FLAGS = """
steps_per_chunk N...    steps of each chunk, the last number repeats (4 2: four, then two)
mid_t_schedules T,T;T   mid times per entry of --steps_per_chunk, fractions allowed
  ("15/16,5/6,5/8;5/6")
num_steps N             steps of every chunk, or of a whole video
context_from_last_step  noisy context
context_from_last_step_start_chunk N  first chunk that leaves it
sigma_max float         noise level of the first step
timestep_shift float    shift of the many-step grid
guidance_scale float    classifier-free guidance; 1 or less: none
ignore_recipe           sample even where the checkpoint was not trained for it
"""


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `chosen_recipe` reads; every default means "as trained"."""
    group = parser.add_argument_group("sampling", "Left out: as the checkpoint was trained.")
    either = {"action": argparse.BooleanOptionalAction, "default": None}
    add_flags(group, _FLAGS, context_from_last_step=either)


def chosen_recipe(
    flags: argparse.Namespace, trained: SamplingRecipe | WholeVideoRecipe
) -> SamplingRecipe | WholeVideoRecipe:
    """The checkpoint's recipe with the flags applied. Raises `ConfigError` for flags that have no
    meaning for it.
    """
    if flags.timestep_shift is not None and trained.kind != "ode":
        raise ConfigError(
            "--timestep_shift belongs to many-step sampling; the checkpoint is sampled with"
            f" {trained.kind!r} steps"
        )
    if isinstance(trained, SamplingRecipe):
        return _causal(flags, trained)
    return _whole(flags, trained)


def _given(flags: argparse.Namespace, fields: dict[str, str]) -> dict[str, Any]:
    found = {field: getattr(flags, flag) for flag, field in fields.items()}
    return {field: value for field, value in found.items() if value is not None}


def _causal(flags: argparse.Namespace, trained: SamplingRecipe) -> SamplingRecipe:
    if flags.num_steps is not None and flags.steps_per_chunk is not None:
        raise ConfigError(
            "--num_steps and --steps_per_chunk both set the number of steps; give one of them"
        )
    if flags.mid_t_schedules is not None and flags.steps_per_chunk is None:
        raise ConfigError(
            "--mid_t_schedules needs --steps_per_chunk with one step count per schedule"
        )
    changes, steps = _given(flags, _GRID | _CONTEXT), flags.steps_per_chunk
    if flags.num_steps is not None and trained.kind == "ode":
        if flags.num_steps < 1:
            raise ConfigError(f"--num_steps {flags.num_steps} must be at least 1")
        changes["ode_steps"] = flags.num_steps
    elif flags.num_steps is not None:
        steps = [flags.num_steps]
    if steps is not None:
        given = () if flags.mid_t_schedules is None else parse_schedules(flags.mid_t_schedules)
        trained = trained.with_steps(*steps, schedules=given, knob="--steps_per_chunk")
    chosen = replace(trained, **changes)
    if flags.context_from_last_step_start_chunk is not None and not chosen.noisy_context:
        raise ConfigError(
            "--context_from_last_step_start_chunk has no effect with clean context; add"
            " --context_from_last_step"
        )
    return chosen


def _whole(flags: argparse.Namespace, trained: WholeVideoRecipe) -> WholeVideoRecipe:
    few = ("steps_per_chunk", "mid_t_schedules", *_CONTEXT)
    causal = [f"--{name}" for name in few if getattr(flags, name) is not None]
    if causal:
        raise ConfigError(
            f"{', '.join(causal)} belong to causal checkpoints; this one is bidirectional and"
            " samples whole videos"
        )
    return replace(trained, **_given(flags, _GRID | {"num_steps": "steps"}))
