"""The kernels that streams with FP8 attention launch, for `rcm.kernels.precompile`: one by one they
take 5 s of a first chunk.
"""

from __future__ import annotations

import torch

from rcm.kernels.fp8_attention import codes, launch
from rcm.kernels.fp8_attention.schedule import SHORT, PortableTiles, chosen_tiles


def attention_plan(
    *, dtype: torch.dtype = torch.bfloat16, heads: int = 2, width: int = 128
) -> None:
    """Launch them on tensors of the meta device. They depend on neither the heads nor the
    lengths.
    """
    with torch.device("meta"):
        q, k = (torch.empty(1, n, heads, width, dtype=dtype) for n in (160, SHORT))
        held = codes.new_codes(codes.scales_of(k, k), batch=1, capacity=SHORT)
        slots = torch.empty(160, dtype=torch.int64)
    for at_slots in (False, True):
        launch.write(held, slots, k, k, at_slots=at_slots)
    queries = launch.code_queries(q, held.scales, scale=1.0)
    for count in (160, SHORT):
        tiles = chosen_tiles(kv_len=count)
        if isinstance(tiles, PortableTiles):
            launch.attend_portable(queries, held, count=count, dtype=dtype, tiles=tiles, parts=1)
        else:
            launch.attend_hopper(queries, held, count=count, dtype=dtype, tiles=tiles)
