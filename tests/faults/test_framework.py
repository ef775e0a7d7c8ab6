"""The suite can fail: each verdict is reached by a case that deserves it."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

import pytest

from rcm.core.errors import ConfigError
from tests.faults.case import Bomb, Broken, Fault, canary, table


def _refuse(folder: Path) -> None:
    raise ConfigError("a knob is wrong; turn it")


def _crash(folder: Path) -> None:
    raise TypeError("unexpected")


def _execute(folder: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(canary(folder))))
    raise ConfigError("a knob is wrong; turn it")


def _advise(folder: Path) -> None:
    raise ConfigError("set weights_only=False")


def _loud(arguments: list[str]) -> int:
    sys.stderr.write("knob: wrong\n")
    return 2


CASES = {
    "refused": (Fault("x", kind="k", refusal="knob", call=_refuse), None),
    "another sentence": (Fault("x", kind="k", refusal="lever", call=_refuse), "unclear"),
    "crash": (Fault("x", kind="k", refusal="knob", call=_crash), "traceback"),
    "execution": (Fault("x", kind="k", refusal="knob", call=_execute), "execution"),
    "dangerous advice": (Fault("x", kind="k", refusal="", call=_advise), "traceback"),
    "nothing happens": (Fault("x", kind="k", refusal="knob", call=lambda folder: None), "exit 0"),
    "hang": (Fault("x", kind="k", refusal="knob", call=lambda folder: time.sleep(5), deadline=0.05), "hang"),
    "command refused": (Fault("x", kind="k", refusal="knob", main=_loud), None),
    "command that goes on": (Fault("x", kind="k", refusal="knob", main=lambda arguments: 0), "exit 0"),
    "accepted": (Fault("x", kind="k", refusal=None, call=lambda folder: None), None),
    "accepted but refused": (Fault("x", kind="k", refusal=None, call=_refuse), "unclear"),
    "process that hangs": (Fault("x", kind="k", refusal="", module="http.server", argv=lambda d: ["0"], deadline=0.05), "hang"),
    "process refused": (Fault("x", kind="k", refusal="No module named", module="no_such_module"), None),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str, tmp_path: Path) -> None:
    case, verdict = CASES[name]
    if verdict is None:
        case.check(tmp_path)
        return
    with pytest.raises(Broken) as caught:
        case.check(tmp_path)
    assert caught.value.verdict == verdict


def test_counts_per_class() -> None:
    lines = table([("a", ""), ("a", "hang"), ("long name", "")])
    assert [line.split() for line in lines[1:]] == [
        ["a", "2", "0", "0", "1", "0", "0"],
        ["long", "name", "1", "0", "0", "0", "0", "0"],
        ["all", "3", "0", "0", "1", "0", "0"],
    ]
