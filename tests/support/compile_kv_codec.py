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
from triton.compiler import CompiledKernel

from rcm.kernels.kv_codec import cluster_kernels, fused, fused_clusters, kernels, restore_kernels
from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.blob import Blob
from rcm.kernels.kv_codec.clusters import Clustering, cluster
from rcm.kernels.kv_codec.formats import CodeFormat
from rcm.kernels.kv_codec.smoothing import Undo
from tests.support.compile_kernels import compiling

NAMES = {
    restore_kernels: ("restore", "deposit", "write_row"),
    kernels: ("extremes", "fit", "write_codes", "encode_bytes"),
    cluster_kernels: ("features", "assign", "recentre"),
}


def main() -> None:
    found: list[dict] = []
    x = torch.randn(1, 256, 12, 128).to(torch.bfloat16)
    out = torch.empty_like(x)
    angles = torch.zeros(256, 64)

    def see(kernel: CompiledKernel, constants: dict) -> None:
        accesses = Counter(re.findall(r"(?:ld|st)\.global[.\w]*", kernel.asm["ptx"]))
        found.append({"kernel": kernel.metadata.name, "constants": constants, "accesses": accesses})

    def launch(blob: Blob, *, turned: bool = False) -> None:
        table, _ = torch.tensor([[blob.addresses]])[0], fused.row_of(blob)
        fused.restore(blob, table, torch.zeros(1, dtype=torch.int64), out, turn=(angles, angles) if turned else None)
        fused.deposit(blob, table[0])

    anywhere = (patch.object(module, "runs_on", lambda _: True) for module in (fused, fused_clusters))
    with compiling(NAMES, see), next(anywhere), next(anywhere):
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
    json.dump(found, sys.stdout, default=str)


if __name__ == "__main__":
    main()
