"""Compile Triton kernels for compute capability 9.0 without a GPU, from the very arguments with
which they would be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


def _type(value: object) -> object:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, tuple):
        return tuple(_type(item) for item in value)
    if isinstance(value, float):
        return "fp32"
    return "i64" if isinstance(value, int) and value >= 2**31 else "i32"


def _is_aligned(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


class _Compiled:
    """Stands in for a kernel: a launch compiles it, and tells `see` of it and its constants."""

    def __init__(self, kernel: triton.JITFunction, see: Callable[[CompiledKernel, dict], None]) -> None:
        self.kernel, self.see = kernel, see

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: object, num_warps: int, enable_fp_fusion: bool = True, **constants: object) -> None:
        names = self.kernel.arg_names
        signature = {name: "constexpr" if name in constants else _type(value) for name, value in zip(names, args, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        fixed = self.kernel.do_not_specialize or ()
        aligned: dict[tuple, list] = {(i,): ALIGNED for i, value in enumerate(args) if names[i] not in fixed and _is_aligned(value)}
        for i, value in enumerate(args):
            if isinstance(value, tuple):
                aligned |= {(i, j): ALIGNED for j, part in enumerate(value) if _is_aligned(part)}
        source = ASTSource(self.kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        self.see(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options), constants)


@contextmanager
def compiling(kernels: Mapping[ModuleType, Sequence[str]], see: Callable[[CompiledKernel, dict], None]) -> Iterator[None]:
    """Kernels, by the names under which modules hold them, are compiled instead of launched."""
    with ExitStack() as stack:
        for module, names in kernels.items():
            for name in names:
                stack.enter_context(patch.object(module, name, _Compiled(getattr(module, name), see)))
        yield


def compiled(call: Callable[[], object], kernels: Mapping[ModuleType, Sequence[str]]) -> list[CompiledKernel]:
    """Those that `call` would launch."""
    found: list[CompiledKernel] = []
    with compiling(kernels, lambda kernel, _: found.append(kernel)):
        call()
    return found
