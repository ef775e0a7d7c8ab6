"""The config.json that published folders keep beside the weights: written for a network, and
compared with the tensors it lies beside. docs/reference/wan.md#sizes, #names-elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rcm.core.errors import CheckpointError
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.convert import Format

# field of WanConfig -> name in the original, in the diffusers settings; None where that form does
# not say it
_NAMES: dict[str, tuple[str | None, str | None]] = {
    "dim": ("dim", None),
    "ffn_dim": ("ffn_dim", "ffn_dim"),
    "num_heads": ("num_heads", "num_attention_heads"),
    "num_layers": ("num_layers", "num_layers"),
    "in_dim": ("in_dim", "in_channels"),
    "out_dim": ("out_dim", "out_channels"),
    "freq_dim": ("freq_dim", "freq_dim"),
    "text_dim": (None, "text_dim"),
    "text_len": ("text_len", None),
    "eps": ("eps", "eps"),
}
# settings of other libraries that change the network -> the values that this architecture has
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("WanModel", "WanTransformer3DModel", "CausalWanModel"),
    "model_type": ("t2v", "i2v", "flf2v"),
    "patch_size": ([1, 2, 2],),
    "qk_norm": (True, "rms_norm_across_heads"),
    "cross_attn_norm": (True,),
    "window_size": ([-1, -1],),
    "rope_max_seq_len": (1024,),
    "vace_layers": (None,),
    "quantization_config": (None,),
}
_DERIVED = ("attention_head_dim", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
_MOST = 1 << 20
_IN_TENSORS = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim")


def published_settings(config: WanConfig, *, form: Format) -> dict[str, Any] | None:
    """The config.json of a network in the "wan" or "diffusers" form; None for other forms."""
    if form == "wan":
        named = {ours: getattr(config, field) for field, (ours, _) in _NAMES.items() if ours}
        task = "i2v" if config.in_dim > config.out_dim else "t2v"
        task = "flf2v" if config.image_positions else task
        return {"_class_name": "WanModel", "model_type": task, **named}
    if form == "diffusers":
        named = {theirs: getattr(config, field) for field, (_, theirs) in _NAMES.items() if theirs}
        return {
            "_class_name": "WanTransformer3DModel",
            **named,
            "attention_head_dim": config.head_dim,
            "patch_size": list(config.patch),
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "image_dim": config.image_dim if config.image_branch else None,
            "added_kv_proj_dim": config.dim if config.image_branch else None,
            "pos_embed_seq_len": config.image_positions or None,
        }
    return None


def unread_settings(settings: Mapping[str, Any] | None) -> list[str]:
    """Settings of a config.json that nothing here knows, its library's private ones left out."""
    known = {name for names in _NAMES.values() for name in names} | _FIXED.keys() | set(_DERIVED)
    return sorted(name for name in settings or () if name not in known and not name.startswith("_"))


def heads_in(settings: Mapping[str, Any] | None) -> int | None:
    """The number of heads a config.json states, None without; `CheckpointError` if malformed."""
    for name in ("num_heads", "num_attention_heads"):
        if settings and name in settings:
            return _whole(settings, name)
    return None


def with_settings(found: WanConfig, settings: Mapping[str, Any] | None) -> WanConfig:
    """`found` (read off tensors) with what only the settings say (eps, text length);
    `CheckpointError` naming every setting that the tensors contradict.
    """
    if not settings:
        return found
    for name, allowed in _FIXED.items():
        if name in settings and settings[name] not in allowed:
            told = " or ".join(map(str, allowed))
            raise CheckpointError(
                f"config.json states {name} {str(settings[name])[:60]}; this architecture has"
                f" {told}"
            )
    positions = found.image_positions or None
    if (told := settings.get("pos_embed_seq_len", positions)) != positions:
        raise CheckpointError(
            f"config.json states pos_embed_seq_len {str(told)[:60]}; the tensors have {positions}"
        )
    stated: dict[str, float] = {}
    for field, names in _NAMES.items():
        for known in names:
            if known is not None and known in settings:
                read = _positive if field == "eps" else _whole
                stated.setdefault(field, read(settings, known))
    heads, width = "num_attention_heads", "attention_head_dim"
    if heads in settings and width in settings:
        stated["dim"] = _whole(settings, heads) * _whole(settings, width)
    wrong = [
        f"{field} {stated[field]}, the tensors have {getattr(found, field)}"
        for field in _IN_TENSORS
        if field in stated and stated[field] != getattr(found, field)
    ]
    if wrong:
        raise CheckpointError(f"config.json contradicts the tensors beside it: {'; '.join(wrong)}")
    return replace(
        found,
        eps=stated.get("eps", found.eps),
        text_len=int(stated.get("text_len", found.text_len)),
    )


def _whole(settings: Mapping[str, Any], name: str) -> int:
    value = settings[name]
    if type(value) is not int or not 1 <= value <= _MOST:
        raise CheckpointError(
            f"config.json states {name} {str(value)[:40]!r}, expected a whole number from 1 to"
            f" {_MOST}"
        )
    return value


def _positive(settings: Mapping[str, Any], name: str) -> float:
    value = settings[name]
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise CheckpointError(
            f"config.json states {name} {str(value)[:40]!r}, expected a number above 0 and at"
            " most 1"
        )
    return value
