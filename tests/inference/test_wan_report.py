"""What the Wan commands print."""

from __future__ import annotations

import io
import threading

from rcm.inference.wan_progress import Progress, spoken
from rcm.inference.wan_report import cost_lines
from rcm.pipelines.experts import Step
from rcm.pipelines.part_clock import PartClock

STEPS = (Step(0, 0.987, "high", 2.0), Step(1, 0.5, "low", 1.0))


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
    assert f"\r[{'#' * 15}{'.' * 15}] step 1/2: t 0.5000, dit, 40.000 s, 40 s left\x1b[K" in shown
    assert f"\r[{'#' * 30}] step 2/2: t 0.5000, dit, 40.000 s\x1b[K\n" in shown
    assert [spoken(s) for s in (5, 120, 7200)] == ["5 s", "2 min", "2.0 h"]


def test_costs():
    clock = PartClock("cpu")
    clock.seconds |= {"text": 1.0, "network": 3.25}
    assert cost_lines(clock, STEPS) == [
        "seconds: text 1.00 s, network 3.25 s; total 4.25 s",
        "network: 2 steps, 1.500 s each (first 2.000, last 1.000)",
    ]
    clock.peak_bytes |= {"text": 2**30, "network": 3 * 2**30}
    assert cost_lines(clock, STEPS)[-1] == "peak GPU memory: 3.00 GiB (text 1.00, network 3.00)"
