"""The fused layers in Triton's interpreter, float32, tiny sizes: values, gradients, tangents against float64, fresh memory poisoned."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CASE_NAMES = [
    "modulation per frame",
    "modulation per sample",
    "modulation shared, odd width",
    "modulation, rows of a slice",
    "modulation, channels not fastest",
    "modulation to float32",
    "affine norm",
    "affine norm of 3 dimensions, odd",
    "rms norm",
    "rms norm of a slice, odd",
    "gate per frame",
    "gate per sample, slices, odd",
    "gelu",
    "gelu of a slice",
    "rotation",
    "rotation of a slice",
    "rotation of 12 channels",
]


def interpret(what: str) -> dict:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted_fused", what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report() -> dict:
    return interpret("cases")


def test_every_case_is_named_here(report):
    assert list(report) == CASE_NAMES


@pytest.mark.parametrize("name", CASE_NAMES)
def test_layer_matches_float64(report, name):
    outputs = [output for output, _, _ in report[name]]
    assert {"value", "gradient 0", "tangent (0,)", "value without gradient"} <= set(outputs)
    for output, error, budget in report[name]:
        assert error <= budget, f"{output}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.slow
def test_broken_layers_are_caught():
    caught = interpret("mutants")
    assert len(caught) > 20
    assert [name for name, seen in caught.items() if not seen] == []
