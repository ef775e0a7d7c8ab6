"""What a card can do: memory and rates. The H200's rates were measured; the others are scaled from it by their published peaks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rcm.core.errors import ConfigError

GIB = float(1 << 30)


@dataclass(frozen=True)
class Card:
    """A GPU. `gib`: memory a process can have. Rates in FLOP/s: large bf16 matrix products, dense attention forward and backward (masked
    attention comes to the share `masked` of them), attention with tangents. `bandwidth`: device memory, read plus write, bytes/s.
    `link`, `network`: bytes/s of a rank to ranks in its node of `node` cards, and beyond. `launch`: seconds a block takes at least.
    """

    name: str
    gib: float
    matmul: float = 620e12
    attention: float = 540e12
    attention_backward: float = 500e12
    attention_tangent: float = 500e12
    masked: float = 0.88
    bandwidth: float = 3.6e12
    link: float = 350e9
    network: float = 45e9
    node: int = 8
    launch: float = 0.8e-3
    measured: bool = False

    def scaled(self, name: str, gib: float, *, compute: float, bandwidth: float) -> Card:
        """Another card with these shares of this one's arithmetic and memory speed."""
        return replace(
            self,
            name=name,
            gib=gib,
            matmul=self.matmul * compute,
            attention=self.attention * compute,
            attention_backward=self.attention_backward * compute,
            attention_tangent=self.attention_tangent * compute,
            bandwidth=self.bandwidth * bandwidth,
            measured=False,
        )


H200 = Card("h200", 139.8, measured=True)

CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        H200,
        H200.scaled("h100", 79.1, compute=1.0, bandwidth=0.70),
        H200.scaled("h20", 95.6, compute=0.15, bandwidth=0.83),
        H200.scaled("b200", 178.0, compute=2.2, bandwidth=1.67),
        H200.scaled("a100-80", 79.2, compute=0.32, bandwidth=0.42),
        H200.scaled("a100-40", 39.4, compute=0.32, bandwidth=0.32),
    )
}
"""By the name that `gpu=` takes."""


def card(name: str, *, memory_gib: float | None = None) -> Card:
    """The card called `name`, with another memory size if one is given. `ConfigError` for an unknown name or an impossible size."""
    if name not in CARDS:
        raise ConfigError(f"unknown gpu={name!r}; choose from {', '.join(CARDS)}, and give memory_gib=N for another size")
    if memory_gib is not None and not memory_gib > 0:
        raise ConfigError(f"memory_gib={memory_gib} must be positive")
    return CARDS[name] if memory_gib is None else replace(CARDS[name], gib=memory_gib)
