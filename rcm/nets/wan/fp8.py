"""Which linear layers of a Wan network run in FP8, their replacement, and what it costs.

Only layers inside the blocks are offered. Patch and text embedding, time layers, modulation and the
output head act on few values that reach every token; the keys and values of the prompt are computed
once per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rcm.core.errors import ConfigError
from rcm.kernels.fused.quantise import ALIGNMENT
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.fp8_linear import (
    FP8Linear,
    FP8Part,
    SharedProjections,
    check_device,
    refuse_loading,
    refuse_saving,
)
from rcm.nets.layers import Gelu
from rcm.nets.layout import TokenLayout
from rcm.nets.lora import is_adapted
from rcm.nets.wan.block import WanBlock
from rcm.nets.wan.model import WanDiT

LAYERS = {
    "qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "o": ("self_attn.o",),
    "cross_q": ("cross_attn.q",),
    "cross_o": ("cross_attn.o",),
    "ffn_in": ("ffn.0",),
    "ffn_out": ("ffn.2",),
}
"""Name to the layers of a block that it replaces, together."""
PRESETS = {"off": (), "auto": ("qkv", "ffn_in", "ffn_out"), "all": tuple(LAYERS)}
"""auto: the layers whose product outweighs the pass that rounds its input."""
Velocity = Callable[[WanDiT], Tensor]


@dataclass(frozen=True)
class FP8Report:
    """Layers `replaced` and `kept`, and the relative `error` of the velocity, None if not asked."""

    replaced: tuple[str, ...]
    kept: tuple[str, ...]
    error: float | None

    def __str__(self) -> str:
        error, kept = "not measured", ""
        if self.error is not None:
            error = f"{self.error:.2e} of the velocity, same noise and weights"
        if self.kept:
            kept = f", {len(self.kept)} kept because their sizes are not multiples of {ALIGNMENT}"
        return f"FP8 linears: {len(self.replaced)} layers replaced{kept}; error {error}"


def chosen_layers(which: str | Iterable[str]) -> tuple[str, ...]:
    """`LAYERS` chosen by a preset, a comma-separated list or names; `ConfigError` for others."""
    if isinstance(which, str):
        which = PRESETS[which] if which in PRESETS else [name.strip() for name in which.split(",")]
    names = list(which)
    for name in names:
        if name not in LAYERS:
            choices = f"{', '.join(PRESETS)}, or a list of {', '.join(LAYERS)}"
            raise ConfigError(f"unknown FP8 layers {name!r}; set --fp8 to {choices}")
    return tuple(name for name in LAYERS if name in names)


@torch.no_grad()
def quantise_linears_(
    net: WanDiT,
    *,
    which: str | Iterable[str] = "auto",
    velocity: Velocity | None = None,
) -> FP8Report:
    """Replace linear layers of the blocks of `net` by `FP8Linear` in place, for inference.

    which      of `chosen_layers`.
    velocity   how to compute a velocity, such as `noise_velocity(net, ...)`; runs before and after,
               and the report states the error.
    A layer whose sizes do not fit is kept, and named in the report. Afterwards `net` is in eval
    mode and refuses training, tangents and its state dict. `ConfigError` for unknown names, a
    network that is quantised or has low-rank adapters, or a GPU without FP8.
    """
    names = chosen_layers(which)
    if is_adapted(net):
        raise ConfigError(
            "a network with low-rank adapters has no FP8 products, which would leave the adapters"
            " out; merge them into its weights first (rcm checkpoint convert)"
        )
    if is_quantised(net):
        raise ConfigError(
            "this network is quantised already; load the weights anew to choose other FP8 layers"
        )
    check_device(net.patch_embedding.weight.device)
    before = None if velocity is None else velocity(net)
    if before is not None:
        _require_some(before)
    net.eval()
    replaced: list[str] = []
    kept: list[str] = []
    for index, block in enumerate(net.blocks):
        for name in names:
            done = replaced if _replace(cast(WanBlock, block), name) else kept
            done += [f"blocks.{index}.{path}" for path in LAYERS[name]]
    if replaced:
        net.register_state_dict_pre_hook(refuse_saving)
        net.register_load_state_dict_pre_hook(refuse_loading)
    error = None if velocity is None or before is None else relative_error(velocity(net), before)
    return FP8Report(tuple(replaced), tuple(kept), error)


def is_quantised(net: nn.Module) -> bool:
    """Whether any layer of `net` is an FP8 one."""
    return any(isinstance(module, FP8Linear) for module in net.modules())


def _require_some(velocity: Tensor) -> None:
    if not velocity.any():
        raise ConfigError(
            "the velocity is zero, as of an untrained network: no FP8 error can be stated; load"
            " weights first"
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def noise_velocity(net: WanDiT, *, size: tuple[int, int], frames: int = 1) -> Velocity:
    """A velocity of noise [1, in_dim, frames, *size] and random text under full attention, half way
    to noise; the same inputs at every call.
    """
    config = net.config
    x, cond = _drawn(net, (1, config.in_dim, frames, *size))
    time = torch.full((1, 1), 500.0, dtype=torch.float32, device=x.device)
    layout = TokenLayout.bidirectional(frames, grid=config.token_grid(*size))
    return lambda network: network(x, time, cond, layout)


def attention_error(denoiser: Denoiser, *, size: tuple[int, int]) -> float:
    """Relative error of the velocity of a frame of noise [in_dim, 1, *size] over a cached one when
    attention runs in FP8: same noise, random text and weights.
    """
    frames, cond = _drawn(denoiser.net, (2, 1, denoiser.net.config.in_dim, 1, *size))
    t = torch.full((1, 1), 0.5, dtype=torch.float64, device=frames.device)
    grid = denoiser.token_grid(*size)
    found = []
    with torch.no_grad():
        for attention in ("net", "fp8"):
            cache = denoiser.new_cache(num_frames=2, grid=grid, attention=attention)
            for place, x in enumerate(frames):
                layout = TokenLayout.over_cache(
                    (place,), grid=grid, context_tokens=cache.num_tokens
                )
                velocity = denoiser.velocity(x, t, cond, layout, cache=cache.append())
            found.append(velocity)
    _require_some(found[0])
    return relative_error(found[1], found[0])


def _drawn(net: WanDiT, shape: tuple[int, ...]) -> tuple[Tensor, Condition]:
    """Noise of `shape` and a random condition of `net`, where its weights lie."""
    config, weight = net.config, net.patch_embedding.weight
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    tokens = config.image_positions or 257
    image = draw(1, tokens, config.image_dim) if config.image_branch else None
    x = draw(*shape)
    return x, Condition(draw(1, config.text_len, config.text_dim), image=image)


def _replace(block: WanBlock, name: str) -> bool:
    """Replace the layers of `name`; False, nothing done, if their sizes do not fit."""
    layers = [cast(nn.Linear, block.get_submodule(path)) for path in LAYERS[name]]
    if any(size % ALIGNMENT for layer in layers for size in layer.weight.shape):
        return False
    if name == "ffn_out" and isinstance(block.ffn[1], Gelu):
        block.ffn[1], block.ffn[2] = nn.Identity(), FP8Linear(*layers, gelu=True)
    elif len(layers) == 1:
        block.set_submodule(LAYERS[name][0], FP8Linear(*layers))
    else:
        shared = SharedProjections(
            FP8Linear(*layers), tuple(layer.out_features for layer in layers)
        )
        for index, path in enumerate(LAYERS[name]):
            block.set_submodule(path, FP8Part(shared, index))
    return True
