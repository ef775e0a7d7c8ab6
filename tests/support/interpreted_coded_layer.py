"""Runs the layers of captured passes over a coded cache with their kernels, in Triton's
interpreter, beside the same in plain torch, and prints the largest difference of queries, keys and
values by case, as JSON.

TRITON_INTERPRET=1 python -m tests.support.interpreted_coded_layer
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from rcm.kernels.kv_codec import fused
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_store import Piece
from rcm.nets.layers import RMSNorm
from rcm.nets.layout import TokenLayout
from rcm.nets.rope import RopePair, RopeTables, rotate
from rcm.pipelines import captured_views
from rcm.pipelines.captured_views import CodedView

GRID, HEADS, HEAD = (2, 3), 2, 16
CODECS = {
    "int4": SideSpec("int4", group_size=4, scale_fit="search"),
    "int2 qvg": SideSpec("int2", "qvg", 4),
    "int8 hadamard": SideSpec("int8", "hadamard", 4),
    "fp8": SideSpec("fp8", group_size=4),
}


@dataclass
class Inputs:
    """Stands in for the device memory of captured passes."""

    slots: Tensor
    pair: RopePair
    fused: bool = True
    times: None = None

    def tables(self, branch: int, context_tokens: int) -> RopePair:
        """The only ones."""
        return self.pair


def drawn(count: int, seed: int) -> tuple[Tensor, ...]:
    """Projections q, k, v [2, 6, E] of one frame."""
    return torch.randn(3, 2, 6 * count, HEADS * HEAD, generator=torch.Generator().manual_seed(seed)).unbind(0)


def both(name: str, keys: str, *, adds: bool) -> list[tuple[Tensor, ...]]:
    """(q, k, v) as attention takes them, by kernels and by plain torch, each of a cache of its
    own.
    """
    rope, found = RopeTables(HEAD, max_rows=2, max_columns=3), []
    side = CODECS[name]
    for kernels in (True, False):
        spec = KVCodecSpec(side, side, qvg_clusters=3, triton_restore=kernels)
        cache = KVCache(1, capacity_tokens=18, keys=keys, codec=KVCodec(spec))
        for frame in range(2):
            view, layout = cache.append(), TokenLayout.over_cache((frame,), grid=GRID, context_tokens=6 * frame)
            view.begin(layout)
            view.layer(0).assemble(*(x.unflatten(2, (HEADS, HEAD)) for x in drawn(1, frame)[1:]))
            view.commit(layout)
        layout = TokenLayout.over_cache((5,), grid=GRID, context_tokens=12)
        own, every = ({"device": torch.device("cpu"), "dtype": torch.float32} for _ in range(2))
        table, whole = rope.table((5,), GRID, **own), rope.table((0, 1, 5) if keys == "pre_rope" else (5,), GRID, **every)
        if adds:
            cache.store.reserve(2, 6)
        pieces = [Piece(0, 6, chunk, 0) for chunk in range(3 if adds else 2)]
        inputs = Inputs(torch.arange(12, 18), RopePair(table, whole))
        view = CodedView(cache, inputs, 0, layout, groups=cache.store.groups(pieces), appends=adds)
        with patch.object(captured_views, "has_kernels", lambda _, kernels=kernels: kernels):
            layer = view.layer(0)
        projected, norms = drawn(1, 7), [RMSNorm(HEADS * HEAD, eps=1e-6) for _ in range(2)]
        if kernels:
            assert layer.takes_projections and layer.enters_turned
            found.append(tuple(x.clone() for x in layer.enter(projected, tuple(norms), table)))
            continue
        q, k = (norm(x).unflatten(2, (HEADS, HEAD)) for norm, x in zip(norms, projected, strict=False))
        k, v = layer.assemble(rotate(k, table) if keys == "post_rope" else k, projected[2].unflatten(2, (HEADS, HEAD)))
        found.append((rotate(q, table), rotate(k, whole) if keys == "pre_rope" else k, v))
    return found


if __name__ == "__main__":
    fused.ELEMENTS, fused.MAX_COLS = 256, 32
    report = {}
    with torch.no_grad():
        for name, keys, adds in itertools.product(CODECS, ("pre_rope", "post_rope"), (False, True)):
            mine, plain = both(name, keys, adds=adds)
            label = f"{name}, {keys}, {'appends' if adds else 'reads'}"
            report[label] = max(float((a - b).abs().max()) for a, b in zip(mine, plain, strict=True))
    json.dump(report, sys.stdout)
