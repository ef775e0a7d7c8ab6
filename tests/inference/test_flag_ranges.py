"""Numbers of command lines, and what a command ends with."""

from __future__ import annotations

import argparse
import re
import sys

import pytest
from loguru import logger

from rcm.core.errors import ConfigError
from rcm.inference.flag_ranges import RANGES, check_numbers
from rcm.inference.outcome import command, exit_status


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


def test_how_commands_end(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    def exhausted(argv):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nException raised")

    def wrong(argv):
        raise ConfigError("one\n  knob caf\udce9")

    def warns(argv):
        logger.info("quiet")
        logger.warning("of <{}> {}", 1, "{x}")

    ends = (interrupted, exhausted, wrong, warns, lambda argv: 0 * sys.stdout.write("caf\udce9\n"), lambda argv: 7)
    assert [command(main)([]) for main in ends] == [130, 2, 2, 0, 0, 7]
    logger.warning("to who called it")
    said = capsys.readouterr()
    assert said.out == "caf\\udce9\n"
    stopped, memory, refused, *warned = said.err.splitlines()
    assert warned == ["warning: of <1> {x}", "warning: to who called it"]
    assert stopped == "stopped"
    assert memory.startswith("error: out of memory") and memory.endswith("; ask for less")
    assert refused == "error: one knob caf\\udce9"
    with pytest.raises(RuntimeError, match="a fault of the program"):
        exit_status(lambda: (_ for _ in ()).throw(RuntimeError("a fault of the program")))
