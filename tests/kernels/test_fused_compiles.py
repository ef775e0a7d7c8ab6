"""The fused layers' kernels compile for compute capability 9.0 with the Triton at hand (no GPU
needed) and move 16 bytes per access.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

X, Y = (torch.empty(1, 2, 64, 1536, dtype=torch.bfloat16) for _ in range(2))
ROW, WEIGHT = torch.empty(1, 2, 1, 1536), torch.empty(1536, dtype=torch.bfloat16)
HEADS, TABLE = torch.empty(1, 64, 12, 128, dtype=torch.bfloat16), torch.empty(64, 64)


def launches() -> dict:
    from rcm.kernels.fused import launch
    from rcm.kernels.fused.launch import NormKind

    modulated, rms, like = NormKind(True, 1.0, 1e-6), NormKind(False, 0.0, 1e-6), (ROW.shape, ROW.dtype)
    return {
        "modulated norm": lambda: launch.norm(X, ROW, ROW, kind=modulated, dtype=X.dtype),
        "modulated norm, tangent": lambda: launch.norm_tangent(X, ROW, ROW, (X, ROW, ROW), kind=modulated, dtype=X.dtype),
        "modulated norm, gradient": lambda: launch.norm_backward(
            X, ROW, Y, kind=modulated, needs=(True, True, True), gain_like=like, shift_like=like
        ),
        "rms norm, tangent": lambda: launch.norm_tangent(X, WEIGHT, None, (X, None, None), kind=rms, dtype=X.dtype),
        "gated add, tangent": lambda: launch.gated_add(X, Y, ROW, (X, Y, ROW)),
        "gated add, gradient": lambda: launch.gated_add_backward(Y, ROW, X, needs=(True, True), gate_like=like),
        "gelu, tangent": lambda: launch.gelu(X, Y),
        "modulated norm, gradient beside its rows": lambda: launch.norm_backward(
            X, ROW, Y, kind=modulated, needs=(True, True, True), gain_like=like, shift_like=like, carried=X
        ),
        "gelu, gradient": lambda: launch.gelu_backward(X, Y),
        "gelu, gradient and sums": lambda: launch.gelu_backward_sums(X, Y),
        "rotation, tangent": lambda: launch.rotate(HEADS, HEADS, TABLE, TABLE),
        "rotation, gradient": lambda: launch.rotate(HEADS, None, TABLE, TABLE, backwards=True),
    }


@pytest.mark.slow
def test_kernels_compile_and_read_wide():
    from rcm.kernels.fused import norm_kernels, pointwise_kernels
    from tests.support.compile_kernels import compiled

    pointwise = ("gated_add_forward", "gated_add_backward", "gelu_forward", "gelu_backward", "gelu_backward_sums", "rotate_pairs")
    kernels = {norm_kernels: ("norm_forward", "norm_tangent", "norm_backward"), pointwise_kernels: pointwise}
    for name, call in launches().items():
        (kernel,) = compiled(call, kernels)
        accesses = re.findall(r"(?:ld|st)\.global[.\w]*", kernel.asm["ptx"])
        narrow = [access for access in accesses if ".v4" not in access]
        assert accesses, name
        assert not narrow, f"{name}: {narrow}"
