"""Compile the codec's kernels for compute capability 9.0 without a GPU, from the very arguments
that `fused.py` passes.

python -m tests.support.compile_kv_codec, without the interpreter, prints per kernel its constants
and its memory accesses as JSON.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rcm.kernels.kv_codec import cluster_kernels, fused, fused_clusters, kernels, restore_kernels
from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.blob import Blob
from rcm.kernels.kv_codec.clusters import Clustering, cluster
from rcm.kernels.kv_codec.formats import CodeFormat
from rcm.kernels.kv_codec.smoothing import Undo

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
NAMES = {
    restore_kernels: ("restore", "deposit", "write_row"),
    kernels: ("extremes", "fit", "write_codes", "encode_bytes"),
    cluster_kernels: ("features", "assign", "recentre"),
}


def _type(value: object) -> object:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, tuple):
        return tuple(_type(item) for item in value)
    return "i64" if isinstance(value, int) and value >= 2**31 else "i32"


class Compiled:
    """Stands in for a kernel: a launch compiles it and counts."""

    def __init__(self, kernel: triton.JITFunction, found: list[dict]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, _grid: object) -> object:
        return self._compile

    def _compile(self, *args: object, num_warps: int, enable_fp_fusion: bool = True, **constants: object) -> None:
        names = self.kernel.arg_names
        signature = {name: "constexpr" if name in constants else _type(value) for name, value in zip(names, args, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {}
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                aligned[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, tuple):
                whole = [j for j, part in enumerate(value) if isinstance(part, Tensor) or part % 16 == 0]
                aligned |= {(i, j): [["tt.divisibility", 16]] for j in whole}
        source = ASTSource(self.kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        accesses = Counter(re.findall(r"(?:ld|st)\.global[.\w]*", done.asm["ptx"]))
        self.found.append({"kernel": done.metadata.name, "constants": constants, "accesses": accesses})


def main() -> None:
    found: list[dict] = []
    x = torch.randn(1, 256, 12, 128).to(torch.bfloat16)
    out = torch.empty_like(x)
    patches = [patch.object(held, name, Compiled(getattr(held, name), found)) for held, names in NAMES.items() for name in names]
    patches.append(patch.object(fused_clusters, "runs_on", lambda _: True))
    angles = torch.zeros(256, 64)

    def launch(blob: Blob, *, turned: bool = False) -> None:
        table, _ = torch.tensor([[blob.addresses]])[0], fused.row_of(blob)
        fused.restore(blob, table, torch.zeros(1, dtype=torch.int64), out, turn=(angles, angles) if turned else None)
        fused.deposit(blob, table[0])

    with patch.object(fused, "runs_on", lambda _: True):
        for p in patches:
            p.start()
        for (dtype, mode, asymmetric), granularity in itertools.product(
            (("fp8", "rcm", False), ("fp4", "release", False), ("int8", "rcm", True), ("int4", "rcm", False), ("int2", "official", True)),
            ("token", "channel"),
        ):
            fmt = CodeFormat(dtype, 64, granularity, asymmetric, mode)
            fused.encode(x, fmt)
            launch(Blob(coding.encode(x, fmt), Undo(), None, x.dtype))
        fused.encode(x, CodeFormat("int2", 64, "token", False, "rcm", fit=True))
        fused_clusters.spherical(x, 256, iters=1, start=None)
        for shared in (True, False):
            parts = cluster(x, Clustering(8, 1, 2, shared, "rcm"))
            fmt = CodeFormat("int2", 64, "channel", False, "rcm")
            fused.encode(parts.residual, fmt, parts.subtract)
            launch(Blob(coding.encode(x, fmt), Undo(), parts.clusters, x.dtype), turned=True)
        hadamard = Undo("hadamard")
        launch(Blob(coding.encode(x, CodeFormat("int2", 64, "channel", False, "rcm")), hadamard, None, x.dtype), turned=True)
        for p in patches:
            p.stop()
    json.dump(found, sys.stdout, default=str)


if __name__ == "__main__":
    main()
