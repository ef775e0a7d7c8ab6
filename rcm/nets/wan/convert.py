"""Strict conversion between checkpoint forms of Wan and its descendants, as dicts of tensors.

The package's own form is the original Wan naming with `patch_embedding.weight` as [dim, in_dim *
patch area]. Understood: original Wan (5-D patch weight), diffusers, rcm (`net.`, `net_ema.`, other
roles by prefix), the Self-Forcing family (generator / generator_ema / critic / model containers,
wrapper names left by FSDP, checkpointing and compile), ComfyUI prefixes.
docs/reference/wan.md#tensors, #names-elsewhere, #files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.two_times import SPAN, with_second_time
from rcm.storage.state_dicts import check_keys, flatten, listed, renamed, shapes_of

Format = Literal["rcm", "wan", "diffusers", "self_forcing", "comfyui"]
Weights = Literal["ema", "live", "fake_score"]

WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
HEAD_DIM = 128
PATCH_KEY = "patch_embedding.weight"
_AVERAGED = frozenset(("ema", "avg", "average", "averaged", "shadow", "swa"))
"""Words by which trainers call a running average."""
_TECHNICAL = frozenset(
    ("net", "generator", "model", "diffusion_model", "module", "state_dict", "transformer")
)
"""Words that say nothing about which copy it is."""
ANCHORS = (
    PATCH_KEY,
    "blocks.0.modulation",
    "blocks.0.scale_shift_table",
    "head.modulation",
    "scale_shift_table",
)
"""Keys that every network has in one of its namings; what stands before one of them is the prefix
of a network.
"""


@dataclass(frozen=True)
class Form:
    """How a family writes a network: the prefix of every key, whether the patch weight is a
    convolution's, the entry of the file that holds the state dict ("" for none).
    """

    prefix: str
    patch_5d: bool
    container: str = ""


FORMS: dict[str, Form] = {
    "rcm": Form("net.", patch_5d=False),
    "wan": Form("", patch_5d=True),
    "diffusers": Form("", patch_5d=True),
    "self_forcing": Form("model.", patch_5d=True, container="generator"),
    "comfyui": Form("model.diffusion_model.", patch_5d=True),
}

# original name, diffusers name; whole dotted components, at the start of a key
_TOP = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("patch_embedding", "patch_embedding"),
)
# the same inside blocks.<i>.; the two libraries number the three norms differently
_BLOCK = (
    ("modulation", "scale_shift_table"),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    *(
        (f"{attention}.{ours}", f"{module}.{theirs}")
        for attention, module in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for ours, theirs in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    ),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
)
_BLOCK_KEY = re.compile(r"(blocks\.\d+\.)(.+)")


def network_prefixes(keys: Iterable[str]) -> dict[str, str]:
    """Which networks a file holds: prefix -> "ema", "live", "fake_score", or another lead as the
    file names it. `keys` may still carry wrapper names.
    """
    found: dict[str, str] = {}
    for key in keys:
        name = WRAPPERS.sub("", key)
        for anchor in ANCHORS:
            prefix = name.removesuffix(anchor)
            whole = prefix != name and (not prefix or prefix.endswith("."))
            if whole and not re.search(r"(^|\.)(blocks\.\d+|head)\.$", prefix):
                found.setdefault(prefix, _copy_of(prefix))
    return found


def network_names(
    keys: Iterable[str],
    *,
    weights: Weights = "ema",
    prefix: str | None = None,
    others: Iterable[str] = (),
) -> dict[str, str]:
    """Name in the package's form -> key in the file, for one network among the flat `keys`.

    `weights`: which copy to take; "ema" takes the only copy where there is no averaged one.
    `prefix`: take exactly the keys under it (for example "net_fake_score."). `others`: keys of
    entries that are no tensors. Keys ending in `._extra_state` are dropped. Raises
    `CheckpointError` if the copy or prefix is absent or not unique, two keys become one, an entry
    of the network is no tensor, or a diffusers key is unknown.
    """
    cleaned = _cleaned(keys)
    chosen = choose_prefix(network_prefixes(cleaned), weights) if prefix is None else prefix
    names = {
        name.removeprefix(chosen): key for name, key in cleaned.items() if name.startswith(chosen)
    }
    if prefix and not names:
        raise CheckpointError(
            f"no key starts with {prefix!r}; there are"
            f" {listed(sorted({key.split('.')[0] + '.' for key in cleaned}))}"
        )
    strangers = sorted(
        key
        for key in others
        if WRAPPERS.sub("", key).startswith(chosen) and not key.endswith("._extra_state")
    )
    if strangers:
        raise CheckpointError(
            f"entries are not tensors: {listed(strangers)}; not a network's state dict, or a"
            " container that needs prefix="
        )
    if any(name.startswith("condition_embedder.") for name in names):
        names = {wan_name(name): key for name, key in names.items()}
    return names


def choose_prefix(found: Mapping[str, str], weights: str) -> str:
    """One copy's prefix among `network_prefixes`, "" for none; errors as `network_names`."""
    known = ("ema", "live", "fake_score")
    if weights not in known:
        raise ConfigError(f"unknown weights {weights!r}; choose from {', '.join(known)}")
    has = ", ".join(f"{prefix}*" if prefix else "one network without prefix" for prefix in found)
    wanted = ("ema", "live") if weights == "ema" else (weights,)
    for copy in wanted:
        prefixes = [prefix for prefix, held in found.items() if held == copy]
        unknown = any(held not in known for held in found.values())
        if copy != weights and prefixes and unknown:
            raise CheckpointError(
                f"it names no averaged weights, and one of {has} may be them; ask for the live ones"
                " or rename the prefix"
            )
        if len(prefixes) > 1:
            raise CheckpointError(
                f"several networks could be the {copy} weights: {has}; name one with prefix="
            )
        if prefixes:
            return prefixes[0]
    if not found and weights != "fake_score":
        return ""
    names = {
        "ema": "net_ema.* (generator_ema)",
        "live": "net.* (generator)",
        "fake_score": "net_fake_score.* weights (critic)",
    }
    other = f"choose other weights than {weights!r}"
    if found and not any(held in known for held in found.values()):  # no word means it
        other = "save it without that prefix"
    raise CheckpointError(f"it holds no {names[weights]} (it has {has or 'no network'}); {other}")


def to_wan(
    state: Mapping[str, object], *, weights: Weights = "ema", prefix: str | None = None
) -> dict[str, Tensor]:
    """Any state dict, nested or flat, in the package's form; arguments as `network_names`."""
    flat = flatten(state)
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    others = [key for key in flat if key not in tensors]
    names = network_names(set(tensors), weights=weights, prefix=prefix, others=others)
    return {name: own_form(name, tensors[key]) for name, key in names.items()}


def own_form(name: str, tensor: Tensor) -> Tensor:
    """A foreign tensor as the package keeps it: patch weight flattened, channel slowest."""
    return tensor.flatten(1) if name == PATCH_KEY else tensor


def other_form(
    name: str, tensor: Tensor, *, form: Format, patch: tuple[int, int, int] = (1, 2, 2)
) -> Tensor:
    """Reverse of `own_form`: families may keep the patch weight as [dim, in_dim, 1, 2, 2]."""
    convolves = name == PATCH_KEY and FORMS[form].patch_5d
    return tensor.unflatten(1, (-1, *patch)) if convolves else tensor


def other_name(name: str, *, form: Format, prefix: str | None = None) -> str:
    """The key of tensor `name` in another family; `prefix` instead of the family's."""
    if form not in FORMS:
        raise ValueError(
            f"checkpoint form must be one of {', '.join(map(repr, FORMS))}, got {form!r}"
        )
    lead = FORMS[form].prefix if prefix is None else prefix
    return lead + (_renamed(name, to_diffusers=True) if form == "diffusers" else name)


def diffusers_layer(layer: str) -> str:
    """What diffusers calls a layer, both names counted from its block."""
    return other_name(f"blocks.0.{layer}", form="diffusers").removeprefix("blocks.0.")


def wan_name(name: str) -> str:
    """The original name of a diffusers key; `CheckpointError` for an unknown one."""
    return _renamed(name, to_diffusers=False)


def from_wan(
    state: Mapping[str, Tensor],
    *,
    form: Format,
    patch: tuple[int, int, int] = (1, 2, 2),
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """The package's own form as another, flat; `prefix` replaces that of the family (`FORMS`)."""
    return {
        other_name(name, form=form, prefix=prefix): other_form(name, value, form=form, patch=patch)
        for name, value in state.items()
    }


def detect_config(state: Mapping[str, Tensor], *, head_dim: int = HEAD_DIM) -> WanConfig:
    """The configuration of a network in the package's own form, read off its shapes (meta tensors
    suffice); head size, text length and patch are not stored and keep the family's values. Raises
    `CheckpointError` naming a missing tensor.
    """
    shape = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if empty := [key for key, sizes in shape.items() if 0 in sizes]:
        raise CheckpointError(f"not a Wan network: {listed(empty)} without elements")
    try:
        base = WanConfig(dim=head_dim, ffn_dim=1, num_heads=1, num_layers=1)
        dim, patched_in = shape[PATCH_KEY]
        blocks = {int(key.split(".")[1]) for key in shape if key.startswith("blocks.")}
        if blocks and not 0 <= min(blocks) <= max(blocks) < len(shape):
            raise CheckpointError(
                f"not a Wan network: it has a block {max(blocks, key=abs)}, and {len(shape)}"
                " tensors in all"
            )
        image = "img_emb.proj.0.weight" in shape
        _, positions, _ = shape.get("img_emb.emb_pos", (1, 0, 0))
        if dim % head_dim:
            raise CheckpointError(
                f"width {dim} is no multiple of the head size {head_dim}; say how many heads it has"
                " (a config.json beside it)"
            )
        return replace(
            base,
            dim=dim,
            ffn_dim=shape["blocks.0.ffn.0.weight"][0],
            num_heads=dim // head_dim,
            num_layers=max(blocks) + 1,
            in_dim=patched_in // base.patch_area,
            out_dim=shape["head.head.weight"][0] // base.patch_area,
            freq_dim=shape["time_embedding.0.weight"][1],
            text_dim=shape["text_embedding.0.weight"][1],
            image_branch=image,
            image_dim=shape["img_emb.proj.0.weight"][0] if image else base.image_dim,
            image_positions=positions,
            two_times=f"{SPAN}.0.weight" in shape,
        )
    except (KeyError, ValueError, IndexError) as error:
        wrong = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"not a Wan network: {wrong}; it has {len(shape)} tensors: {listed(sorted(shape))}"
        ) from error


def load(
    net: nn.Module,
    state: Mapping[str, object],
    *,
    weights: Weights = "ema",
    prefix: str | None = None,
) -> None:
    """Put any understood state dict into `net`, all of it or nothing. On the meta device the
    tensors are taken over as they are. Weights of one time fit a network of two, whose second then
    begins without effect (`with_second_time`).

    Raises `CheckpointError` listing keys that are missing, left over, or of another shape.
    """
    ours, theirs = net.state_dict(), to_wan(state, weights=weights, prefix=prefix)
    if isinstance(config := getattr(net, "config", None), WanConfig):
        theirs = dict(with_second_time(theirs, config))
    check_keys(
        "checkpoint",
        shapes=shapes_of(theirs),
        expected=shapes_of(ours),
        network=f"the network of {len(ours)} tensors",
        advice="choose the net preset it was made for",
    )
    net.load_state_dict(theirs, strict=True, assign=any(tensor.is_meta for tensor in ours.values()))


def _copy_of(prefix: str) -> str:
    """Which weights a prefix names; a plain or technical one means the live ones."""
    words = prefix.split(".")[:-1]
    if any(_AVERAGED.intersection(word.lower().split("_")) for word in words):
        return "ema"
    if any(word == "critic" or word.endswith("fake_score") for word in words):
        return "fake_score"
    named = [word for word in words if word not in _TECHNICAL]
    return ".".join(named) or "live"


def _cleaned(keys: Iterable[str]) -> dict[str, str]:
    """Key without wrapper names -> key, extra states left out."""
    out: dict[str, str] = {}
    for key in keys:
        name = WRAPPERS.sub("", key)
        if name in out:
            raise CheckpointError(
                f"key {name!r} occurs twice, with and without wrapper names; the file mixes two"
                " copies"
            )
        if not name.endswith("._extra_state"):
            out[name] = key
    return out


def _renamed(key: str, *, to_diffusers: bool) -> str:
    block = _BLOCK_KEY.fullmatch(key)
    lead, rest, table = (block[1], block[2], _BLOCK) if block else ("", key, _TOP)
    pairs = table if to_diffusers else tuple((theirs, ours) for ours, theirs in table)
    if (found := renamed(rest, pairs)) is not None:
        return lead + found
    if key.startswith(f"{SPAN}."):
        raise CheckpointError(
            f"key {key!r} embeds the second time of a network, which diffusers has no name for;"
            " choose the rcm or wan form"
        )
    raise CheckpointError(
        f"key {key!r} has no {'diffusers' if to_diffusers else 'Wan'} counterpart; is this a Wan"
        " transformer?"
    )
