"""Rounding of rows to e4m3: the kernel in Triton's interpreter against the plain formula, and its code for compute
capability 9.0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


def test_kernel_rounds_as_the_plain_formula():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted_quantise"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout).items():
        budget = 2e-7 if name == "gelu" else 0.0
        assert found["scale"] <= budget, name
        assert found["differing"] <= (0.01 if name == "gelu" else 0.0), name


@pytest.mark.slow
def test_kernel_compiles_to_one_wide_pass_with_the_hardware_cast():
    from rcm.kernels.fused import quantise
    from tests.support.compile_fused import compiled

    for gelu in (False, True):
        (kernel,) = compiled(lambda gelu=gelu: quantise.launch(torch.empty(64, 1536, dtype=torch.bfloat16), gelu=gelu))
        ptx = kernel.asm["ptx"]
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
        assert ptx.count("ld.global") == ptx.count("ld.global.v4")
