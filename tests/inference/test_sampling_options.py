"""The options of sampling are one table: its fields are those of the recipes, and commands that
take the same options make the same of them.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from rcm.core.errors import ConfigError
from rcm.core.flag_ranges import RANGES
from rcm.inference.causal_flags import CAUSAL, causal_parser, recipe_of, settle_flags
from rcm.inference.stream import _parser
from rcm.inference.stream_recipe import MANY, OPTIONS, chosen_recipe, refuse
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.rollout.recipe import SamplingRecipe
from scripts.vbench_flags import causal_recipe
from scripts.vbench_sample import arguments

TIMES = ("--steps_per_chunk", "3", "2", "--mid_t_schedules", "9/10,1/2;3/4")


def test_fields_and_ranges():
    causal, whole = ({field.name for field in fields(kind)} for kind in (SamplingRecipe, WholeVideoRecipe))
    for name, option in OPTIONS.items():
        assert {option.causal} <= causal | {""} and {option.whole} <= whole | {""}, name
        assert option.kind not in ("N", "N...", "float") or name in RANGES, name


@pytest.mark.parametrize(
    "words",
    [(), ("--num_steps", "2"), TIMES, ("--steps_per_chunk", "4", "1"), ("--sigma_max", "80", "--num_steps", "3"),
     (*TIMES, "--context_from_last_step", "--context_from_last_step_start_chunk", "1")],
)  # fmt: skip
def test_few_steps_are_the_same_in_every_command(words):
    flags = causal_parser("x", about=None, defaults=CAUSAL).parse_args(["--distilled", *words])
    settle_flags(flags, CAUSAL)
    made = recipe_of(flags)
    assert causal_recipe(arguments(["--dit_path", "x", "--distilled", *words])) == made
    assert chosen_recipe(_parser().parse_args(list(words)), SamplingRecipe("few_step", "c1-1")) == made


def test_many_steps():
    words = ["--num_steps", "7", "--timestep_shift", "2", "--guidance_scale", "0"]
    made = causal_recipe(arguments(["--dit_path", "x", *words]))
    assert made == SamplingRecipe("ode", "c1-1", ode_steps=7, shift=2.0, guidance=0.0)
    flags = arguments(["--dit_path", "x", *words])
    with pytest.raises(ConfigError, match="^--guidance_scale, --timestep_shift stay out$"):
        refuse(flags, MANY, "stay out")  # a number that is 0 was given
    whole = WholeVideoRecipe("ode", 1600.0, 50)
    assert chosen_recipe(_parser().parse_args(words), whole) == replace(whole, steps=7, shift=2.0, guidance=0.0)
