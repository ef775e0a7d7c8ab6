"""Low-rank adapters of a Wan network while it is trained: their settings, which layers carry them,
and the largest rank that makes sense.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.convert import diffusers_layer

LAYERS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)
"""Linear layers of a block that take adapters; embeddings, time layers, modulation and head stay as
they are.
"""


@dataclass(frozen=True)
class LoRAConfig(Record):
    """Low-rank adapters of student and fake score, on frozen weights (docs/lora.md)."""

    # rank of every update (PEFT's r); 0 = no adapters, all weights are trained
    rank: int = within(0, least=0)
    # strength of an update times the rank (lora_alpha); null = the rank, strength 1
    alpha: float | None = within(None, most=1e9)
    # ends of layer names (target_modules), of both attentions
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "targets"):
            value = getattr(self, key)
            if not self.rank and value != getattr(LoRAConfig, key):
                raise ConfigError(
                    f"{key}={value} has no effect while model.config.lora.rank=0 trains all"
                    " weights; set model.config.lora.rank too, such as 64"
                )
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha} must be positive; null is the rank")

    @property
    def layers(self) -> tuple[str, ...]:
        """The `LAYERS` that carry adapters; none with rank 0."""
        return adapted_layers(self.targets) if self.rank else ()


def adapted_layers(
    targets: Iterable[str], *, knob: str = "model.config.lora.targets"
) -> tuple[str, ...]:
    """The `LAYERS` that `targets` name, in their order. As in PEFT, a target is the end of a
    layer's name in whole words ("q", "self_attn.q", "ffn.0"), in Wan's or in diffusers' naming
    ("to_q", "attn1.to_q", "ffn.net.2").

    Raises `ConfigError` naming a target that is none, and for no target at all.
    """
    spelt = {layer: (layer, diffusers_layer(layer)) for layer in LAYERS}
    chosen = set()
    for target in targets:
        found = {
            layer
            for layer, names in spelt.items()
            if any(f".{name}".endswith(f".{target}") for name in names)
        }
        if not found or not target:
            raise ConfigError(
                f"{knob} names {target!r}, which is no linear layer of a block; choose from q, k,"
                f" v, o, ffn.0, ffn.2, or of one attention: {', '.join(LAYERS[:8])}"
            )
        chosen |= found
    if not chosen:
        raise ConfigError(
            f"{knob} is empty, which leaves nothing to train; choose from q, k, v, o, ffn.0, ffn.2"
        )
    return tuple(layer for layer in LAYERS if layer in chosen)


def layer_size(layer: str, config: WanConfig) -> tuple[int, int]:
    """(in_features, out_features) of a layer in `LAYERS`."""
    wide = {"ffn.0": (config.dim, config.ffn_dim), "ffn.2": (config.ffn_dim, config.dim)}
    return wide.get(layer, (config.dim, config.dim))


def largest_rank(layers: Iterable[str], config: WanConfig) -> int:
    """The smallest layer's rank: larger factors have more numbers than it has directions."""
    return min(min(layer_size(layer, config)) for layer in layers)


def factor_shapes(layers: Iterable[str], config: WanConfig, *, rank: int) -> list[tuple[int, int]]:
    """Shapes of one block's factors A and B, layer by layer."""
    sizes = [layer_size(layer, config) for layer in layers]
    return [shape for wide_in, wide_out in sizes for shape in ((rank, wide_in), (wide_out, rank))]
