"""The fused layers in Triton's interpreter, float32, tiny sizes: values, gradients, tangents
against float64, fresh memory poisoned.
"""

from __future__ import annotations

import pytest

from tests.support.in_interpreter import in_interpreter

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
    "modulation beside its rows",
    "affine norm beside its rows, odd",
    "rms norm",
    "rms norm of a slice, odd",
    "gate per frame",
    "gate per sample, slices, odd",
    "gelu",
    "gelu of a slice",
    "gelu of a product",
    "gelu of a product, slices, odd",
    "rotation",
    "rotation of a slice",
    "rotation of 12 channels",
]


@pytest.fixture(scope="module")
def report() -> dict:
    return in_interpreter("interpreted_fused", "cases")


def test_every_case_is_named_here(report):
    assert list(report) == [*CASE_NAMES, "network"]


@pytest.mark.parametrize("name", CASE_NAMES)
def test_layer_matches_float64(report, name):
    outputs = [output for output, _, _ in report[name]]
    assert {"value", "gradient 0", "tangent (0,)", "value without gradient"} <= set(outputs)
    for output, error, budget in report[name]:
        assert error <= budget, f"{output}: error {error:.2e}, budget {budget:.2e}"


def test_a_network_of_fused_layers_has_the_gradients_of_plain_ones(report):
    assert len(report["network"]) > 20
    assert [(name, error) for name, error, budget in report["network"] if not error <= budget] == []


@pytest.mark.slow
def test_broken_layers_are_caught():
    caught = in_interpreter("interpreted_fused", "mutants")
    assert len(caught) > 20
    assert [name for name, seen in caught.items() if not seen] == []
