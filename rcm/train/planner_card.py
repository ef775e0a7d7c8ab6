"""What a card can do. The H200's rates were measured; the others are scaled from it by their
published peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rcm.core.errors import ConfigError

GIB = float(1 << 30)


@dataclass(frozen=True)
class Card:
    """A GPU: FLOP/s of bfloat16 arithmetic, bytes/s of what moves data."""

    name: str
    gib: float  # memory that a process can have
    matmul: float = 720e12  # large matrix products
    attention: float = 550e12  # forward
    attention_backward: float = 485e12
    attention_tangent: float = 640e12
    masked: float = 0.9  # share of the last two that masked attention reaches
    bandwidth: float = 3.6e12  # device memory, read plus write
    link: float = 350e9  # of a rank to the other ranks of its node
    reorder: float = 115e9  # exchanged heads, beside the link: copies around it, smaller calls
    network: float = 45e9  # of a rank to other nodes
    host: float = 50e9  # to or from pinned host memory; assumed from the bus (PCIe 5.0 x16)
    host_gather: float = 13e9  # the same tensor by tensor, as FSDP2 gathers what lives there
    host_sum: float = 1.6e9  # gradients added up there, as FSDP2 does it
    node: int = 8  # cards of a node
    capability: tuple[int, int] = (9, 0)
    launch: float = 2.4e-3  # seconds that the host issues a block in
    launch_ranks: float = 5.5e-3  # the same where ranks share parameters, and wait for the slowest
    measured: bool = False


H200 = Card("h200", 139.8, measured=True)


PCIE_4 = 24e9
"""Bytes/s of copies over PCIe 4.0 x16, assumed."""


def _scaled(name: str, gib: float, *, compute: float, bandwidth: float, **links: Any) -> Card:
    """A card with these shares of the H200's arithmetic and memory speed."""
    arithmetic = ("matmul", "attention", "attention_backward", "attention_tangent")
    rates: dict[str, Any] = {rate: getattr(H200, rate) * compute for rate in arithmetic}
    return Card(
        name,
        gib,
        bandwidth=H200.bandwidth * bandwidth,
        reorder=H200.reorder * bandwidth,
        **rates,
        **links,
    )


_A100: dict[str, Any] = {"host": PCIE_4, "capability": (8, 0)}
_ADA: dict[str, Any] = {"host": PCIE_4, "link": PCIE_4, "capability": (8, 9)}
"""Linked by the bus alone."""

CARDS = {
    card.name: card
    for card in (
        H200,
        _scaled("h100", 79.1, compute=1.0, bandwidth=0.70),
        _scaled("h20", 95.6, compute=0.15, bandwidth=0.83),
        _scaled("b200", 178.0, compute=2.2, bandwidth=1.67, capability=(10, 0)),
        _scaled("a100-80", 79.2, compute=0.32, bandwidth=0.42, **_A100),
        _scaled("a100-40", 39.4, compute=0.32, bandwidth=0.32, **_A100),
        _scaled("l40s", 44.4, compute=0.366, bandwidth=0.18, **_ADA),
        _scaled("rtx4090", 23.5, compute=0.167, bandwidth=0.21, **_ADA),
    )
}
"""By the name that `gpu=` takes."""


def card(name: str, *, memory_gib: float | None = None) -> Card:
    """The card called `name`, with another memory size if one is given. `ConfigError` for an
    unknown name or an impossible size.
    """
    if name not in CARDS:
        raise ConfigError(
            f"unknown gpu={name!r}; choose from {', '.join(CARDS)}, and give memory_gib=N for"
            " another size"
        )
    if memory_gib is not None and not memory_gib > 0:
        raise ConfigError(f"memory_gib={memory_gib} must be positive")
    return CARDS[name] if memory_gib is None else replace(CARDS[name], gib=memory_gib)
