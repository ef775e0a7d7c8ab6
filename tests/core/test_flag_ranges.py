"""Numbers of command lines."""

from __future__ import annotations

import argparse
import re

import pytest

from rcm.core.errors import ConfigError
from rcm.core.flag_ranges import RANGES, check_numbers


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_every_range(name):
    for number in RANGES[name]:
        check_numbers(argparse.Namespace(**{name: number}))
        check_numbers(argparse.Namespace(**{name: [number, None, True, "word"]}))
    least, most = RANGES[name]
    for number in (least - 1, most + 1, float("nan"), float("inf"), [least, most * 2 + 1], 10**30):
        with pytest.raises(ConfigError, match=f"^--{name} .* must be"):
            check_numbers(argparse.Namespace(**{name: number}))


@pytest.mark.parametrize(
    ("name", "number", "told"),
    [
        *(("sigma_max", number, "must be a finite number, from 0.001 to 1e+09") for number in (float("nan"), float("inf"), -float("inf"))),
        ("sigma_max", -1.0, "--sigma_max -1 must be positive, at least 0.001"),
        ("timestep_shift", -3.0, "--timestep_shift -3 must be positive, at least 0.01 (1: no shift)"),
        ("num_steps", 0, "--num_steps 0 must be at least 1"),
        ("seed", 10**20 - 1, "--seed 99999999999999999999 must be at most 4294967295"),
        ("fps", 2000.0, "--fps 2000 must be at most 1000"),
    ],
)
def test_what_is_said_of_a_number(name, number, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_numbers(argparse.Namespace(**{name: number}))


def test_numbers_of_other_names_are_finite():
    check_numbers(argparse.Namespace(other=-1e18, many=2**62))
    for number in (float("nan"), 2**64):
        with pytest.raises(ConfigError, match="--other .* must be"):
            check_numbers(argparse.Namespace(other=number))
