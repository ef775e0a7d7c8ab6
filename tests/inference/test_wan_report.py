"""What the Wan commands print."""

from __future__ import annotations

import io

from rcm.inference.wan_progress import StepLines
from rcm.inference.wan_report import cost_lines
from rcm.pipelines.experts import Step
from rcm.pipelines.part_clock import PartClock

STEPS = (Step(0, 0.987, "high", 2.0), Step(1, 0.5, "low", 1.0))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_per_step_where_there_is_no_terminal():
    out = io.StringIO()
    for step in STEPS:
        StepLines(out)(step, 2)
    assert out.getvalue() == "step 1/2: t 0.9870, high, 2.000 s\nstep 2/2: t 0.5000, low, 1.000 s\n"


def test_a_bar_on_a_terminal():
    out = Terminal()
    for step in STEPS:
        StepLines(out)(step, 2)
    first, second = out.getvalue().split("\r")[1:]
    assert first.startswith(f"[{'#' * 15}{'.' * 15}] step 1/2") and "\n" not in first
    assert second.startswith(f"[{'#' * 30}] step 2/2") and second.endswith("\n")


def test_costs():
    clock = PartClock("cpu")
    clock.seconds |= {"text": 1.0, "network": 3.25}
    assert cost_lines(clock, STEPS) == [
        "seconds: text 1.00 s, network 3.25 s; total 4.25 s",
        "network: 2 steps, 1.500 s each (first 2.000, last 1.000)",
    ]
    clock.peak_bytes |= {"text": 2**30, "network": 3 * 2**30}
    assert cost_lines(clock, STEPS)[-1] == "peak GPU memory: 3.00 GiB (text 1.00, network 3.00)"
