"""Compile the fused layers' kernels for compute capability 9.0 without a GPU, from the very
arguments that `launch.py` passes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rcm.kernels.fused import norm_kernels, pointwise_kernels, quantise_kernels

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}
KERNELS = (
    (norm_kernels, ("norm_forward", "norm_tangent", "norm_backward")),
    (quantise_kernels, ("quantise_rows",)),
    (pointwise_kernels, ("gated_add_forward", "gated_add_backward", "gelu_forward", "gelu_backward", "gelu_backward_sums", "rotate_pairs")),
)


def _type(value: object) -> object:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, tuple):
        return tuple(_type(item) for item in value)
    return "fp32" if isinstance(value, float) else "i32"


class _Compiled:
    """Stands in for a kernel: a launch compiles it and keeps the result."""

    def __init__(self, kernel: triton.JITFunction, found: list) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: object, num_warps: int, **constants: object) -> None:
        names = self.kernel.arg_names
        signature = {name: "constexpr" if name in constants else _type(value) for name, value in zip(names, args, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned: dict[tuple, list] = {}
        for i, value in enumerate(args):
            fixed = names[i] not in (self.kernel.do_not_specialize or ())
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and fixed):
                aligned[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, tuple):
                aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
        source = ASTSource(self.kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
        self.found.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}))


def compiled(call: Callable[[], object]) -> list:
    """Run `call` with every kernel compiled instead of launched; the compiled kernels."""
    found: list = []
    with ExitStack() as stack:
        for module, names in KERNELS:
            for name in names:
                stack.enter_context(patch.object(module, name, _Compiled(getattr(module, name), found)))
        call()
    return found
