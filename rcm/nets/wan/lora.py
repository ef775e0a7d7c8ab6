"""Low-rank updates (LoRA) of a Wan network as dicts of tensors: their names, and merging.

W <- W + scale * strength * B A, with A [rank, in] and B [out, rank], summed in float32; strength is
alpha / rank, or what the adapter's settings say (rcm/nets/wan/lora_settings.py). Understood: PEFT
(`lora_A`, `lora_B`, with or without an adapter's name, as LongLive writes them), the `lora_down` /
`lora_up` of other trainers, `.alpha` entries; target names in the original or the diffusers naming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.core.errors import CheckpointError
from rcm.nets.wan.convert import WRAPPERS, diffusers_layer, other_name, wan_name

CONTAINERS = ("generator_lora.", "generator.")
RUN_COPIES = ("net_ema.", "net.", "net_fake_score.")
"""Sets of adapters in a checkpoint of a training run: average, student, fake score."""
RUN_HEAD = "net_gan_head."
"""What such a checkpoint may have beside them: the head of a discriminator, which has none."""
LEADS = ("base_model.model.", "diffusion_model.", "transformer.", "model.", *RUN_COPIES)
LAYOUTS = {"wan": "diffusion_model.", "diffusers": "transformer.", "peft": "base_model.model."}
"""How adapters are published -> what leads every key: ComfyUI and the trainers of Wan; diffusers; a
folder of PEFT.
"""
_DOWN = re.compile(r"(.+)\.(?:lora_A|lora_down)(?:\.[\w-]+)?\.weight")
_UP = re.compile(r"(.+)\.(?:lora_B|lora_up)(?:\.[\w-]+)?\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")


@dataclass(frozen=True)
class LoRAPair:
    """Keys in the file of one target's factors; `alpha` None where the file does not say. `module`:
    the target as the trainer calls it.
    """

    down: str
    up: str
    alpha: str | None = None
    module: str = ""


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are the keys of low-rank factors."""
    return any(_DOWN.fullmatch(key) for key in keys)


def lora_pairs(headers: Mapping[str, Tensor]) -> dict[str, LoRAPair]:
    """Target weight in the package's form -> its pair, for a file's entries (or meta tensors).

    A file with several adapters gives that of the generator, or the averaged one of a training run.
    Raises `CheckpointError` for an entry of the adapter that is none of these, a factor without its
    partner, ranks that disagree, or no factor at all.
    """
    keys = [key for key in headers if not key.startswith(RUN_HEAD)]
    of_run = all(key.startswith(RUN_COPIES) for key in keys)
    for container in RUN_COPIES if of_run else CONTAINERS:
        inside = [key for key in keys if key.startswith(container)]
        if is_lora(inside):
            keys = inside
            break
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        kind, target = _part(key)
        if kind is None:
            raise CheckpointError(
                f"{key!r} is no factor of a low-rank update (lora_A, lora_B, lora_down, lora_up,"
                " alpha); it cannot be merged"
            )
        name = _target(target)
        if kind in found.setdefault(name, {}):
            raise CheckpointError(
                f"{key!r} and {found[name][kind]!r} are both the {kind} of {name}; give one adapter"
            )
        found[name][kind] = key
    if not found:
        raise CheckpointError("it holds no factor of a low-rank update, so nothing would be merged")
    pairs = {}
    for name, parts in found.items():
        if "down" not in parts or "up" not in parts:
            raise CheckpointError(
                f"{name} has {' and '.join(sorted(parts))} only; a low-rank update needs down"
                " and up"
            )
        down, up = headers[parts["down"]].shape, headers[parts["up"]].shape
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
            raise CheckpointError(
                f"the factors of {name} do not fit: down {tuple(down)}, up {tuple(up)}"
            )
        alpha = headers[parts["alpha"]] if "alpha" in parts else None
        if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
            raise CheckpointError(
                f"{parts['alpha']!r} has shape {tuple(alpha.shape)} and dtype {alpha.dtype},"
                " expected one number"
            )
        module = _module(_part(parts["down"])[1])
        pairs[name] = LoRAPair(parts["down"], parts["up"], parts.get("alpha"), module)
    return pairs


def check_targets(
    pairs: Mapping[str, LoRAPair], headers: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    """`CheckpointError` for targets missing in the network `base` (own form) or misshapen."""
    unknown = sorted(name for name in pairs if name not in base)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(pairs)} targets are not in the network:"
            f" {', '.join(unknown[:8])}"
        )
    for name, pair in pairs.items():
        product = (headers[pair.up].shape[0], headers[pair.down].shape[1])
        if product != tuple(base[name].shape):
            raise CheckpointError(
                f"the update of {name} has shape {product}, the weight {tuple(base[name].shape)};"
                " it is for another network"
            )


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B) of tensors under a network's own names."""
    downs = {match[1]: tensor for key, tensor in tensors.items() if (match := _DOWN.fullmatch(key))}
    ups = {match[1]: tensor for key, tensor in tensors.items() if (match := _UP.fullmatch(key))}
    return {layer: (down, ups[layer]) for layer, down in downs.items()}


def published(
    factors: Mapping[str, tuple[Tensor, Tensor]], *, layout: str, alpha: float
) -> dict[str, Tensor]:
    """Factors (A, B) by layer of the network under the keys of a published `LAYOUTS`; where nothing
    else in such a file says alpha, it is an entry of each layer.
    """
    lead, diffusers = LAYOUTS[layout], layout == "diffusers"
    found: dict[str, Tensor] = {}
    for layer, (down, up) in factors.items():
        name = lead + (other_name(layer, form="diffusers") if diffusers else layer)
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if layout == "wan":
            found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


def peft_settings(
    layers: Iterable[str], *, layout: str, rank: int, alpha: float, base: str | None = None
) -> dict[str, object]:
    """adapter_config.json for adapters on these `layers` of each block."""
    if layout == "diffusers":
        layers = map(diffusers_layer, layers)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(layers),
        "base_model_name_or_path": base,
    }


def merge(weight: Tensor, *, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`weight` [out, in] + scale * up [out, r] @ down [r, in], float32 or wider, where it lies."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    factors = (up.to(device=weight.device, dtype=wide), down.to(device=weight.device, dtype=wide))
    return torch.addmm(weight.to(wide), *factors, alpha=scale)


def _part(key: str) -> tuple[str | None, str]:
    for kind, pattern in (("down", _DOWN), ("up", _UP), ("alpha", _ALPHA)):
        if match := pattern.fullmatch(key):
            return kind, match[1]
    return None, key


def _module(target: str) -> str:
    for lead in (*CONTAINERS, "base_model.model."):
        target = target.removeprefix(lead)
    return target


def _target(target: str) -> str:
    """Name of the weight that a factor's lead belongs to."""
    name = WRAPPERS.sub("", target)
    for lead in (*CONTAINERS, *LEADS, *LEADS):
        name = name.removeprefix(lead)
    if re.search(r"\.attn[12]\.|\.ffn\.net\.|^condition_embedder\.|^proj_out$", name):
        name = wan_name(name)
    return name + ".weight"
