"""Numbers of command lines, and what a command ends with."""

from __future__ import annotations

import argparse
import io
import threading

import pytest

from rcm.core.errors import ConfigError
from rcm.inference.flag_ranges import RANGES, check_numbers
from rcm.inference.outcome import command, exit_status
from rcm.inference.wan_progress import Progress, spoken
from rcm.pipelines.experts import Step
from rcm.pipelines.part_clock import PartClock


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_every_range(name):
    for number in RANGES[name]:
        check_numbers(argparse.Namespace(**{name: number}))
        check_numbers(argparse.Namespace(**{name: [number, None, True, "word"]}))
    least, most = RANGES[name]
    for number in (least - 1, most + 1, float("nan"), float("inf"), [least, most * 2 + 1], 10**30):
        with pytest.raises(ConfigError, match=f"^--{name} .* must be"):
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

    assert [command(main)([]) for main in (interrupted, exhausted, wrong, lambda argv: None, lambda argv: 7)] == [130, 2, 2, 0, 7]
    stopped, memory, refused = capsys.readouterr().err.splitlines()
    assert stopped == "stopped"
    assert memory.startswith("error: out of memory") and memory.endswith("; ask for less")
    assert refused == "error: one knob caf\\udce9"
    with pytest.raises(RuntimeError, match="a fault of the program"):
        exit_status(lambda: (_ for _ in ()).throw(RuntimeError("a fault of the program")))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _work(out: io.StringIO) -> str:
    clock = PartClock("cpu")
    with Progress(out) as progress:
        clock.watch = progress.part
        with clock.part("load"):
            progress._tick(progress._since + 31)
        with clock.part("solver"):
            for number in range(2):
                with clock.part("network"):
                    pass
                progress.step(Step(number, 0.5, "dit", 40.0), 2)
        with clock.part("decode"):
            pass
    assert threading.active_count() == 1 or not progress._thread.is_alive()
    return out.getvalue()


def test_progress_of_parts_and_steps():
    assert _work(io.StringIO()).splitlines() == [
        "loading a model",
        "still loading a model, 31 s",
        "step 1/2: t 0.5000, dit, 40.000 s",
        "step 2/2: t 0.5000, dit, 40.000 s",
        "decoding the video",
    ]
    shown = _work(Terminal())
    assert "\rloading a model, 31 s\x1b[K" in shown
    assert "step 1/2: t 0.5000, dit, 40.000 s, 40 s left\x1b[K" in shown
    assert [spoken(s) for s in (5, 120, 7200)] == ["5 s", "2 min", "2.0 h"]
