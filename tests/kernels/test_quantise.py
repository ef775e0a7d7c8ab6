"""Rounding of rows to e4m3: the kernel in Triton's interpreter against the plain formula, and its
code for compute capability 9.0.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.in_interpreter import in_interpreter

pytest.importorskip("triton")


def test_kernel_rounds_as_the_plain_formula():
    for name, found in in_interpreter("interpreted_quantise").items():
        budget = 2e-7 if name == "gelu" else 0.0
        assert found["scale"] <= budget, name
        assert found["differing"] <= (0.01 if name == "gelu" else 0.0), name


@pytest.mark.slow
def test_kernel_compiles_to_one_wide_pass_with_the_hardware_cast():
    from rcm.kernels.fused import quantise, quantise_kernels
    from tests.support.compile_kernels import compiled

    for gelu in (False, True):
        x, kernels = torch.empty(64, 1536, dtype=torch.bfloat16), {quantise_kernels: ("quantise_rows",)}
        (kernel,) = compiled(lambda gelu=gelu, x=x: quantise.launch(x, gelu=gelu), kernels)
        ptx = kernel.asm["ptx"]
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
        assert ptx.count("ld.global") == ptx.count("ld.global.v4")
