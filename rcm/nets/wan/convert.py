"""Strict conversion between the checkpoint formats of Wan and its descendants. Tensors in dicts only; reading files is not this
module's business.

The package's own form is the original Wan naming with `patch_embedding.weight` as [dim, in_dim * patch area]. Understood: original Wan
(5-D patch weight), diffusers, rcm (`net.`, `net_ema.`, other roles by prefix), the Self-Forcing family (generator / generator_ema /
model containers, wrapper names left by FSDP, checkpointing and compile), ComfyUI prefixes. spec/wan.md 1.2, 2.1, 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from rcm.core.errors import CheckpointError
from rcm.nets.wan.config import WanConfig

Format = Literal["rcm", "wan", "diffusers"]
Weights = Literal["ema", "live"]

CONTAINERS = {"ema": ("generator_ema", "generator"), "live": ("generator", "generator_ema")}
PLAIN_CONTAINERS = ("model", "state_dict", "module")
ROLE_PREFIXES = {"ema": ("net_ema.", "net."), "live": ("net.", "net_ema.")}
OUTER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
HEAD_DIM = 128
PATCH_KEY = "patch_embedding.weight"

# original name, diffusers name; whole dotted components, at the start of a key
_TOP = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
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
    *((f"self_attn.{ours}", f"attn1.{theirs}") for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))),
    *((f"cross_attn.{ours}", f"attn2.{theirs}") for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))),
    *(
        (f"{ours}.norm_{side}", f"{theirs}.norm_{side}")
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for side in "qk"
    ),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
)
_BLOCK_KEY = re.compile(r"(blocks\.\d+\.)(.+)")


def to_wan(state: Mapping[str, object], *, weights: Weights = "ema", prefix: str | None = None) -> dict[str, Tensor]:
    """Any understood state dict in the package's own form.

    `weights`: which copy to take where a file holds a live and an averaged one. `prefix`: take exactly the keys under it (for example
    "net_fake_score."), for files that hold several networks. Keys ending in `._extra_state` are dropped.
    Raises `CheckpointError` if the prefix is absent, two keys become one, an entry is no tensor, or a diffusers key is unknown.
    """
    flat = _unwrap(state, weights)
    flat = _cleaned(flat)
    flat = _select(flat, weights=weights, prefix=prefix)
    if any(key.startswith("condition_embedder.") for key in flat):
        flat = _renamed(flat, to_diffusers=False)
    strangers = sorted(key for key, value in flat.items() if not isinstance(value, Tensor))
    if strangers:
        raise CheckpointError(
            f"entries are not tensors: {_listed(strangers)}; not a network's state dict, or a container that needs prefix="
        )
    if PATCH_KEY in flat:
        flat[PATCH_KEY] = flat[PATCH_KEY].flatten(1)
    return flat


def from_wan(
    state: Mapping[str, Tensor], *, form: Format, patch: tuple[int, int, int] = (1, 2, 2), prefix: str = "net."
) -> dict[str, Tensor]:
    """The package's own form as another. "rcm": `prefix` before every key; "wan", "diffusers": the patch weight as a convolution's."""
    if form == "rcm":
        return {prefix + key: value for key, value in state.items()}
    if form not in ("wan", "diffusers"):
        raise ValueError(f"checkpoint form must be 'rcm', 'wan' or 'diffusers', got {form!r}")
    out = dict(state)
    out[PATCH_KEY] = out[PATCH_KEY].unflatten(1, (-1, *patch))
    return _renamed(out, to_diffusers=True) if form == "diffusers" else out


def detect_config(state: Mapping[str, Tensor], *, head_dim: int = HEAD_DIM) -> WanConfig:
    """The configuration of a network in the package's own form, read off its shapes; head size, text length and patch are not stored
    and keep the family's values. Raises `CheckpointError` naming a missing tensor."""
    shape = {key: tuple(tensor.shape) for key, tensor in state.items()}
    base = WanConfig(dim=head_dim, ffn_dim=1, num_heads=1, num_layers=1)
    try:
        dim, patched_in = shape[PATCH_KEY]
        blocks = {int(key.split(".")[1]) for key in shape if key.startswith("blocks.")}
        image = "img_emb.proj.0.weight" in shape
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
        )
    except (KeyError, ValueError) as missing:
        raise CheckpointError(f"not a Wan network: {missing}; it has {len(shape)} tensors: {_listed(sorted(shape))}") from missing


def load(net: nn.Module, state: Mapping[str, object], *, weights: Weights = "ema", prefix: str | None = None) -> None:
    """Put any understood state dict into `net`, all of it or nothing. On the meta device the tensors are taken over as they are.

    Raises `CheckpointError` listing keys that are missing, left over, or of another shape.
    """
    ours, theirs = net.state_dict(), to_wan(state, weights=weights, prefix=prefix)
    check_keys(ours, theirs)
    net.load_state_dict(theirs, strict=True, assign=any(tensor.is_meta for tensor in ours.values()))


def check_keys(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless both have the same keys and shapes, naming what differs."""
    problems = []
    if missing := sorted(expected.keys() - got.keys()):
        problems.append(f"missing: {_listed(missing)}")
    if extra := sorted(got.keys() - expected.keys()):
        problems.append(f"not in the network: {_listed(extra)}")
    shapes = [
        f"{key} {tuple(got[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & got.keys())
        if got[key].shape != expected[key].shape
    ]
    if shapes:
        problems.append(f"of another shape: {_listed(shapes)}")
    if problems:
        raise CheckpointError(
            f"checkpoint does not fit the network of {len(expected)} tensors; "
            + "; ".join(problems)
            + ". Choose the net preset it was made for"
        )


def _unwrap(state: Mapping[str, object], weights: Weights) -> Mapping[str, object]:
    """Descend into the containers that trainers put around a state dict."""
    while True:
        inner = next((name for name in (*CONTAINERS[weights], *PLAIN_CONTAINERS) if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            return state
        state = state[inner]


def _cleaned(flat: Mapping[str, object]) -> dict[str, object]:
    """Keys without wrapper names and extra states."""
    out: dict[str, object] = {}
    for key, value in flat.items():
        name = WRAPPERS.sub("", key)
        if name in out:
            raise CheckpointError(f"key {name!r} occurs twice, with and without wrapper names; the file mixes two copies")
        if not name.endswith("._extra_state"):
            out[name] = value
    return out


def _select(flat: dict[str, object], *, weights: Weights, prefix: str | None) -> dict[str, object]:
    """Keys of one network, without prefixes."""
    if prefix is not None:
        chosen = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
        if not chosen:
            raise CheckpointError(f"no key starts with {prefix!r}; there are {_listed(sorted({key.split('.')[0] + '.' for key in flat}))}")
        return chosen
    for role in ROLE_PREFIXES[weights]:
        if any(key.startswith(role) for key in flat):
            return {key.removeprefix(role): value for key, value in flat.items() if key.startswith(role)}
    for outer in OUTER_PREFIXES:
        if flat and all(key.startswith(outer) for key in flat):
            return {key.removeprefix(outer): value for key, value in flat.items()}
    return flat


def _renamed(state: Mapping[str, object], *, to_diffusers: bool) -> dict[str, object]:
    out = {}
    for key, value in state.items():
        block = _BLOCK_KEY.fullmatch(key)
        lead, rest, table = (block[1], block[2], _BLOCK) if block else ("", key, _TOP)
        name = next(
            (lead + new + rest[len(old) :] for old, new in _directed(table, to_diffusers) if rest == old or rest.startswith(old + ".")),
            None,
        )
        if name is None:
            raise CheckpointError(f"key {key!r} has no {'diffusers' if to_diffusers else 'Wan'} counterpart; is this a Wan transformer?")
        out[name] = value
    return out


def _directed(table: tuple[tuple[str, str], ...], to_diffusers: bool) -> tuple[tuple[str, str], ...]:
    return table if to_diffusers else tuple((theirs, ours) for ours, theirs in table)


def _listed(names: list[str], shown: int = 8) -> str:
    """The first few of many names."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
