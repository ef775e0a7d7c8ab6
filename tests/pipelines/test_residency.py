"""Where models are and what parts cost."""

from __future__ import annotations

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.pipelines import part_clock
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import POLICIES, MemoryPolicy, Resident


class Watch:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch) -> Watch:
    found = Watch()
    monkeypatch.setattr(part_clock, "time", found)
    return found


def test_a_part_inside_another_is_taken_out_of_it(watch):
    clock = PartClock("cpu")
    with clock.part("outer"):
        watch.now += 1
        with clock.part("inner"):
            watch.now += 10
        watch.now += 2
    watch.now += 1000  # nobody's
    with clock.part("inner"):
        watch.now += 20
    assert clock.seconds == {"outer": 3, "inner": 30}
    assert list(clock.seconds) == ["outer", "inner"] and clock.total == 33
    assert clock.peak is None, "the CPU does not count"
    clock.restart()
    assert clock.total == 0


def test_the_innermost_part_of_an_exception_is_kept():
    clock = PartClock("cpu")
    with pytest.raises(ValueError), clock.part("outer"), clock.part("inner"):
        raise ValueError
    assert clock.interrupted == "inner"


class Model:
    pass


def resident(device: str = "meta") -> tuple[Resident, list]:
    """A model whose device is one that is not the CPU, and what happened to it."""
    events = []
    found = Resident(
        lambda: events.append("load") or Model(),
        move=lambda model, where: events.append(where.type),
        device=torch.device(device),
        clock=PartClock("cpu"),
    )
    return found, events


def test_loading_waits_for_the_first_use():
    model, events = resident()
    model.rest("free")
    assert events == [] and not model.is_loaded
    assert model.use() is model.use()
    assert events == ["load"]


@pytest.mark.parametrize(
    ("idle", "expected"),
    [("keep", ["load"]), ("cpu", ["load", "cpu", "meta", "cpu"]), ("free", ["load", "load"])],
)
def test_resting(idle, expected):
    model, events = resident()
    model.use()
    model.rest(idle)
    model.rest(idle)
    model.use()
    model.rest("cpu" if idle == "cpu" else "keep")
    assert events == expected
    assert {"load", "move"} >= set(model.clock.seconds)


def test_on_the_cpu_there_is_nowhere_to_go():
    model, events = resident("cpu")
    model.use()
    model.rest("cpu")
    assert events == ["load"] and model.is_loaded


def test_policies_by_name():
    assert MemoryPolicy.preset("idle") == MemoryPolicy() == POLICIES["idle"]
    with pytest.raises(ConfigError, match="choose --offload from none, idle, low"):
        MemoryPolicy.preset("all")
