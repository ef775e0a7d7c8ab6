"""The blocks of a network, whatever network it is."""

from __future__ import annotations

from typing import Any

from torch import nn


def blocks_of(net: nn.Module) -> list[Any]:
    """`net.blocks` in order; a block has what `parallelize` asks of it."""
    blocks: Any = net.blocks
    return list(blocks)
