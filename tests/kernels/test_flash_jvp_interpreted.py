"""The portable Triton kernel, run by Triton's interpreter on the CPU (float32 and float16; bfloat16
is wrong there) at tiny sizes.
"""

from __future__ import annotations

import pytest
import torch

from rcm.kernels.flash_jvp import flash_jvp
from rcm.kernels.flash_jvp.validation import check_problem
from tests.support.attention_oracle import random_inputs
from tests.support.in_interpreter import in_interpreter

pytest.importorskip("triton")

CASE_NAMES = [
    "dense odd",
    "dense exact tiles",
    "one key",
    "cross q only",
    "k only",
    "v only",
    "no tangent",
    "k and v",
    "padded heads",
    "half precision",
    "tangent start inside a tile",
    "tangent start, v only",
    "tangent start behind all keys",
    "causal",
    "streamed window sink",
    "packed",
    "noisy",
    "noisy window 1 sink",
    "noisy window 2 sink",
    "large scores",
    "noisy, half precision",
]


@pytest.fixture(scope="module")
def report() -> dict:
    return in_interpreter("interpreted_kernel", "cases")


def test_every_case_is_named_here(report):
    assert sorted(report) == sorted(CASE_NAMES)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_kernel_matches_float64(report, name):
    errors, budgets = report[name]["errors"], report[name]["budgets"]
    for output, budget in budgets.items():
        assert errors[output] <= budget, f"{output}: error {errors[output]:.2e}, budget {budget:.2e} (twice that of eager code)"


def test_output_dtypes_and_absent_tangent(report):
    assert report["half precision"]["dtypes"] == ["torch.float16", "torch.float16", "torch.float32"]
    assert report["no tangent"]["dtypes"] == ["torch.float32", "None", "torch.float32"]


@pytest.mark.slow
def test_broken_kernels_are_caught():
    caught = in_interpreter("interpreted_kernel", "mutants")
    assert len(caught) > 15
    assert [name for name, seen in caught.items() if not seen] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without CUDA")
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, RuntimeError, "needs a CUDA device"),
        ({"dtype": torch.float64}, TypeError, "float64"),
        ({"d_qk": 8}, ValueError, "head size of q and k"),
        ({"d_v": 257}, ValueError, "head size of v"),
        ({"scale": -1.0}, ValueError, "positive scale"),
    ],
)
def test_triton_is_never_replaced_silently(options, error, words):
    options = dict(options)
    scale = options.pop("scale", None)
    inputs = random_inputs(q_len=4, kv_len=4, **{"dtype": torch.float32, **options})
    with pytest.raises(error, match=words):
        flash_jvp(**inputs, scale=scale, implementation="triton")


def test_an_unknown_kernel_is_no_other_kernel():
    from rcm.kernels.flash_jvp.launch import triton_jvp

    inputs = random_inputs(q_len=4, kv_len=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="kernel must be one of auto, hopper, portable, got 'hoper'"):
        triton_jvp(check_problem(**inputs, mask=None, scale=None, tangent_start=0), kernel="hoper")
