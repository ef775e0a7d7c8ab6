"""How strong an update is, wherever a trainer wrote it; settings not understood are refused.

PEFT keeps an adapter_config.json beside the file; diffusers the same settings in the file's
metadata under `lora_adapter_metadata`, keys led by the model's name; kohya's trainers
`ss_network_alpha` and `ss_network_dim`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rcm.core.errors import CheckpointError

# settings that change the update -> the values under which they do not
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA and LoftQ take the update out of the base weights first, so that A and B
    # belong to other weights
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_TOLD_ONLY = frozenset(
    ("base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout")
    + ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping")
    + ("megatron_config", "megatron_core", "peft_version", "runtime_config", "loftq_config")
    + ("eva_config", "corda_config", "qalora_group_size", "ensure_weight_tying")
)
_ALPHAS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")
_RANKS = ("ss_network_dim", "network_dim", "rank", "r")
_STABILISED = ("use_rslora", "rslora", "rs_lora")
V = TypeVar("V")
_LITERAL = re.compile(r"\^?[\w.\\-]{1,300}")


@dataclass(frozen=True)
class LoRASettings:
    """`alpha` of all targets (None: unstated), `alphas` and `ranks` by the end of a target's name;
    `stabilised`: alpha / sqrt(rank).
    """

    alpha: float | None = None
    rank: int | None = None
    stabilised: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    def strength(self, target: str, *, rank: int, alpha: float | None = None) -> float:
        """Factor of up @ down for `target` (the file's name of the module): `alpha` (None: what the
        settings say, else the rank) over the rank or, where the settings say so, its square root.
        `CheckpointError` where they state another rank.
        """
        if (stated := _of(target, self.ranks) or self.rank) not in (None, rank):
            raise CheckpointError(
                f"its settings state rank {stated} for {target}, the factors have {rank}"
            )
        chosen = alpha if alpha is not None else _of(target, self.alphas)
        chosen = chosen if chosen is not None else self.alpha
        if chosen is None:
            if self.stabilised:
                raise CheckpointError(
                    "its settings say rank-stabilised (alpha / sqrt(rank)) and no alpha; say it"
                    " with --lora_alpha"
                )
            return 1.0
        return chosen / (math.sqrt(rank) if self.stabilised else rank)


def lora_settings(
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    *,
    others: Iterable[str] = (),
    given: bool = False,
) -> LoRASettings:
    """The settings of an adapter: `config` the adapter_config.json, `metadata` of the file,
    `others` its entries that are no tensors. `given`: alpha is the caller's, so that what the file
    says of it does not matter.

    Raises `CheckpointError` for a setting that changes the update and is not understood, for values
    that are none, and for two alphas.
    """
    untold = [key for key in others if re.search(r"(alpha|rank|scal|rslora|dora)", key.lower())]
    if untold and not given:
        raise CheckpointError(
            f"it states {', '.join(untold[:4])} as plain values, which are not read; say alpha with"
            " --lora_alpha"
        )
    stated = [settings for settings in (config, _of_diffusers(metadata)) if settings]
    found = [*map(_of_peft, stated), _of_metadata(metadata)]
    alphas = {s.alpha for s in found if s.alpha is not None}
    if len(alphas) > 1 and not given:
        told = " and ".join(f"{alpha:g}" for alpha in sorted(alphas))
        raise CheckpointError(
            f"its settings state {len(alphas)} alphas, {told}; say which with --lora_alpha"
        )
    ranks = {s.rank for s in found if s.rank is not None}
    if len(ranks) > 1:
        raise CheckpointError(
            f"its settings state {len(ranks)} ranks, {' and '.join(map(str, sorted(ranks)))}"
        )
    return LoRASettings(
        alpha=next(iter(alphas), None),
        rank=next(iter(ranks), None),
        stabilised=any(s.stabilised for s in found),
        alphas={k: v for s in found for k, v in s.alphas.items()},
        ranks={k: v for s in found for k, v in s.ranks.items()},
    )


def _of_peft(settings: Mapping[str, Any]) -> LoRASettings:
    for key, value in settings.items():
        if key in _READ or key in _TOLD_ONLY or value in (None, False, "", [], {}):
            continue
        if value not in _NEUTRAL.get(key, ()):
            raise CheckpointError(
                f"its settings have {key}={str(value)[:60]}, which changes the update and is not"
                " understood here; merge it with the tools that trained it"
            )
    patterns = [settings.get(name) or {} for name in ("alpha_pattern", "rank_pattern")]
    for name, pattern in zip(("alpha_pattern", "rank_pattern"), patterns, strict=True):
        if not isinstance(pattern, Mapping) or any(not _LITERAL.fullmatch(key) for key in pattern):
            raise CheckpointError(
                f"its {name} has names that are expressions; only plain ends of module names are"
                " understood"
            )
    return LoRASettings(
        alpha=_number(settings, "lora_alpha"),
        rank=_rank(settings, "r"),
        stabilised=_flag(settings, "use_rslora"),
        alphas=_by_name(patterns[0], _number),
        ranks=_by_name(patterns[1], _rank),
    )


def _by_name(
    pattern: Mapping[str, Any], read: Callable[[Mapping[str, Any], str], V | None]
) -> dict[str, V]:
    """The values of a pattern that are stated, by the end of a target's name."""
    found = {key.replace("\\.", "."): read(pattern, key) for key in pattern}
    return {name: value for name, value in found.items() if value is not None}


def _of_diffusers(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's settings inside diffusers' metadata, without the model's name before each key."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        listed = json.loads(text)
        return {key.removeprefix("transformer."): value for key, value in listed.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError("its lora_adapter_metadata is no object of settings") from error


def _of_metadata(metadata: Mapping[str, str]) -> LoRASettings:
    """kohya's settings, and the plain words that other trainers use."""
    arguments = metadata.get("ss_network_args", "").lower()
    said = f"{metadata.get('ss_network_module', '').lower()} {arguments}"
    if odd := re.search(
        r"\b(lycoris|loha|lokr|dora_wd|oft|boft|dylora)\b(?!\W*(false|0|none))", said
    ):
        raise CheckpointError(
            f"its metadata says {odd[1]}, another kind of update than up @ down; it cannot be"
            " merged here"
        )
    alphas = {
        key: _number(metadata, key)
        for key in _ALPHAS
        if metadata.get(key) not in (None, "None", "")
    }
    ranks = {
        key: _rank(metadata, key)
        for key in _RANKS
        if metadata.get(key) not in (None, "None", "", "Dynamic")
    }
    if len(set(alphas.values())) > 1 or len(set(ranks.values())) > 1:
        raise CheckpointError(f"its metadata contradicts itself: {alphas | ranks}")
    stabilised = any(_flag(metadata, key) for key in _STABILISED) or bool(
        re.search(r'"rs_?lora": "?true', arguments)
    )
    return LoRASettings(
        next(iter(alphas.values()), None), next(iter(ranks.values()), None), stabilised
    )


def _number(settings: Mapping[str, Any], key: str) -> float | None:
    value = settings.get(key)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(
            f"its settings have {key}={str(value)[:60]}, expected a finite number"
        )
    return number


def _rank(settings: Mapping[str, Any], key: str) -> int | None:
    number = _number(settings, key)
    if number is None or (number == int(number) and number >= 1):
        return None if number is None else int(number)
    raise CheckpointError(
        f"its settings have {key}={number:g}, expected a whole number of at least 1"
    )


def _flag(settings: Mapping[str, Any], key: str) -> bool:
    value = settings.get(key)
    if str(value).lower() in ("true", "1"):
        return True
    if str(value).lower() in ("none", "false", "0", ""):
        return False
    raise CheckpointError(f"its settings have {key}={str(value)[:60]}, expected true or false")


def _of(target: str, stated: Mapping[str, Any]) -> Any:
    """The first value whose name ends `target` in whole words (is it, after "^"), as in PEFT."""
    for name, value in stated.items():
        ends = not name.startswith("^") and target.endswith(f".{name}")
        if ends or target == name.removeprefix("^"):
            return value
    return None
