"""The kernels of the fused layers that one network's passes without gradient launch, for
`rcm.kernels.precompile`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rcm.kernels.fused import launch, quantise
from rcm.kernels.fused.launch import NormKind


def inference_plan(
    *,
    width: int,
    hidden: int,
    heads: int,
    tokens: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-6,
    fp8: bool = False,
) -> Callable[[], None]:
    """A plan that launches, on tensors of the meta device, the forward kernels of blocks of `width`
    channels, feed- forwards of `hidden` and `heads` heads; with `fp8` those of quantised layers,
    too. Kernels do not depend on the number of tokens, beyond its divisibility by 16.
    """

    def plan() -> None:
        with torch.device("meta"):
            x = torch.empty(1, 1, tokens, width, dtype=dtype)
            wide = torch.empty(1, 1, tokens, hidden, dtype=dtype)
            row, gain = torch.empty(1, 1, 1, width), torch.empty(width, dtype=dtype)
            head = torch.empty(1, tokens, heads, width // heads, dtype=dtype)
            table = torch.empty(tokens, width // heads // 2)
        for out in (dtype, torch.float32):
            launch.norm(x, row, row, kind=NormKind(center=True, offset=1.0, eps=eps), dtype=out)
        launch.norm(x, gain, gain, kind=NormKind(center=True, offset=0.0, eps=eps), dtype=dtype)
        launch.norm(x, gain, None, kind=NormKind(center=False, offset=0.0, eps=eps), dtype=dtype)
        launch.gated_add(x, x, row, (None, None, None))
        launch.gelu(wide, None)
        launch.rotate(head, None, table, table)
        if fp8:
            quantise.launch(x.flatten(0, 2), gelu=False)
            quantise.launch(wide.flatten(0, 2), gelu=True)

    return plan
