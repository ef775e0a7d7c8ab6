"""Runs the package quant-videogen in Triton's interpreter next to mode "official" and prints, as
JSON, what is not equal.

TRITON_INTERPRET=1 python -m tests.support.official_kv_codec The package's kernels are tuned by
timing and round by a CUDA library; both are replaced: the first configuration that fits, and
rounding halves away from zero. Only its modules for packing and accumulating are imported; the rest
of it wants packages that are not here.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import sys
import types

import numpy as np
import torch
import triton
from torch import Tensor

from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.clusters import Clusters, euclidean
from rcm.kernels.kv_codec.codec import Blob, reference
from rcm.kernels.kv_codec.formats import CodeFormat
from rcm.kernels.kv_codec.smoothing import Undo
from tests.support import interpreter_casts

PACKAGE = "quant_videogen"


class _First:
    """An autotuned kernel that always runs its first configuration that fits."""

    def __init__(self, tuned: object, fits: object) -> None:
        self.tuned, self.fits = tuned, fits

    def __getitem__(self, grid: object) -> object:
        def launch(*args: object) -> None:
            config = next(c for c in self.tuned.configs if self.fits(c.kwargs, args))
            inner = self.tuned.fn
            derived = {}
            if hasattr(inner, "values"):
                named = {**dict(zip(inner.arg_names, args, strict=False)), **config.kwargs}
                derived = {name: rule(named) for name, rule in inner.values.items()}
                inner = inner.fn
            inner[grid(config.kwargs)](*args, **config.kwargs, **derived)

        return launch


def load() -> tuple[types.ModuleType, types.ModuleType]:
    """The package's packing and accumulating modules."""
    root = importlib.util.find_spec(PACKAGE).submodule_search_locations[0]
    for name, path in ((PACKAGE, root), (f"{PACKAGE}.real", f"{root}/real")):
        module = types.ModuleType(name)
        module.__path__ = [path]
        sys.modules[name] = module
    pack = importlib.import_module(f"{PACKAGE}.real.quant_pack")
    accumulate = importlib.import_module(f"{PACKAGE}.real.accumulate")

    def away(x: object, **_: object) -> object:
        data = x.handle.data if hasattr(x, "handle") else x
        rounded = np.copysign(np.floor(np.abs(data) + np.float32(0.5)), data).astype(np.float32)
        return triton.language.core.tensor(type(x.handle)(rounded, x.handle.dtype), x.type)

    pack.libdevice = types.SimpleNamespace(round=away)
    kernel = pack._quant_pack_kernel
    function = kernel.fn.fn if hasattr(kernel.fn, "fn") and hasattr(kernel.fn, "values") else kernel.fn
    getattr(function, "fn", function).__globals__["libdevice"] = pack.libdevice
    pack._quant_pack_kernel = _First(kernel, lambda kwargs, args: args[4] % kwargs["BLOCK_D"] == 0 and kwargs["BLOCK_D"] % args[9] == 0)
    accumulate._nstage_accum_kernel = _First(accumulate._nstage_accum_kernel, lambda kwargs, args: True)
    return pack, accumulate


def differences(x: Tensor, bits: int, asymmetric: bool, stages: int, modules: tuple) -> list[str]:
    """What of one case is not equal, bit for bit: packed codes, scales, zeros, and what is
    restored.
    """
    pack, accumulate = modules
    found, centroids, assigned, residual = [], [], [], x
    # the package's own clustering needs CUDA: the stages are ours, the sum of the stages is checked
    for _ in range(stages):
        means, nearest, _ = euclidean(residual, 4, iters=3, start=None)
        residual = residual - means.gather(1, nearest.unsqueeze(3).expand_as(residual))
        centroids.append(means)
        assigned.append(nearest.to(torch.uint8))
    mine = coding.encode(residual, CodeFormat(f"int{bits}", 16, "token", asymmetric, "official"))
    theirs = pack.quant_pack(residual.transpose(1, 2), 16, bits, torch.float8_e4m3fn, pack_output_int8=bits < 8, asymmetric=asymmetric)
    b, s, n, _ = x.shape
    for name, own, other in zip(("data", "scales", "zeros"), (mine.data, mine.scales, mine.zeros), theirs, strict=True):
        if other is None or own is None:
            found += [] if other is own else [name]
        elif not torch.equal(_bits(own.view(b, s, n, -1)), _bits(other.transpose(1, 2).contiguous())):
            found.append(name)
    clusters = Clusters(torch.stack(centroids), torch.stack(assigned), True) if stages else None
    if stages:
        restored = accumulate.nstage_accum(
            [c.transpose(1, 2) for c in centroids], [a.transpose(1, 2) for a in assigned], *theirs[:2],
            block_size=16, num_bits=bits, PACK_INPUT_INT8=bits < 8, output_dtype=torch.float32, zeros=theirs[2],
        )  # fmt: skip
        # the package keeps codes of 128 and more in int8 and restores them as negative
        wraps = bits == 8 and asymmetric
        if not wraps and not torch.equal(restored.transpose(1, 2), reference(Blob(mine, Undo(), clusters, x.dtype))):
            found.append("restored")
    return found


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def main() -> None:
    interpreter_casts.install()
    modules = load()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 2, 32, generator=generator)
    x[..., 3] *= 9
    x[0, 1] *= 2.0**-6
    x[0, 2] = torch.randint(-8, 9, (2, 32), generator=generator) / 2
    found = {}
    for bits, asymmetric, stages in itertools.product((2, 4, 8), (False, True), (0, 1, 2)):
        name = f"int{bits}{' asymmetric' if asymmetric else ''}, {stages} stages"
        found[name] = differences(x, bits, asymmetric, stages, modules)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
