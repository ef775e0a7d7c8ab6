"""What a checkpoint's self-description may say: one table of fields, types and bounds, checked
before anything is built from it.

The bounds are far above every published network and far below what would stop a machine. Relations
between fields are checked too; those with tensors by who reads them
(`rcm/pipelines/wan_files.py:config_of`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.wan.adapters import LAYERS, largest_rank
from rcm.nets.wan.config import WanConfig
from rcm.rollout.recipe import KINDS, SamplingRecipe

Rule = Callable[[Any], str | None]
"""A value's objection, as the end of "is ..., expected ..."; None where it is fine."""

MOST_VALUES = 100_000
MOST_CHARACTERS = 1 << 20
MOST_LATENT = 1 << 31


def _rule(told: str, fits: Callable[[Any], bool]) -> Rule:
    return lambda v: None if fits(v) else told


def whole(low: int, high: int) -> Rule:
    """An integer in [low, high]."""
    told = f"a whole number from {low} to {high}"
    return _rule(told, lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float, *, above: bool = False) -> Rule:
    """A finite number in [low, high], or (low, high] if `above`."""
    told = f"a number above {low:g} and at most {high:g}"
    told = told if above else f"a number from {low:g} to {high:g}"

    def fits(v: Any) -> bool:  # which infinity and NaN do not, either
        return type(v) in (int, float) and low <= v <= high and not (above and v == low)

    return _rule(told, fits)


def word(most: int = 100) -> Rule:
    """Printable text of one line."""
    told = f"a line of at most {most} characters"
    return _rule(told, lambda v: isinstance(v, str) and len(v) <= most and v.isprintable())


def text(most: int = 1 << 16) -> Rule:
    """Any text that UTF-8 can hold."""
    odd = re.compile("[\0\ud800-\udfff]")
    told = f"text of at most {most} characters"
    return _rule(told, lambda v: isinstance(v, str) and len(v) <= most and not odd.search(v))


def one_of(*choices: object) -> Rule:
    """One of these values."""
    told = f"one of {', '.join(map(repr, choices))}"
    return _rule(told, lambda v: any(type(v) is type(c) and v == c for c in choices))


def matching(form: str, told: str) -> Rule:
    """Text of this form alone."""
    return _rule(told, lambda v: isinstance(v, str) and re.fullmatch(form, v) is not None)


def listed(rule: Rule, *, low: int, high: int) -> Rule:
    """A list of low to high values that fit `rule`."""

    def check(v: Any) -> str | None:
        if not isinstance(v, list) or not low <= len(v) <= high:
            return f"a list of {low if low == high else f'{low} to {high}'} values"
        return next((f"a list whose entries are each {told}" for e in v if (told := rule(e))), None)

    return check


def optional(rule: Rule) -> Rule:
    """`rule`, or null."""
    return lambda v: None if v is None or rule(v) is None else f"{rule(v)}, or null"


pattern = matching(r"c[1-9]\d{0,3}-[1-9]\d{0,3}", "a block pattern such as 'c3-3'")
"""A block pattern of at most four digits each."""
hexadecimal = matching(r"[0-9a-f]{32}", "32 hexadecimal digits")
"""A digest of `rcm/storage/digest.py`."""


def bare(v: Any) -> str | None:
    """Any JSON value of bounded size (`_require_bounded` has seen to that)."""
    return None


_FLAG, _GUIDANCE, _SHIFT, _SIGMA = (
    one_of(False, True),
    number(0, 1000),
    number(0, 1e6, above=True),
    number(0, 1e9, above=True),
)
_WIDTH, _POSITIONS = whole(1, 1 << 17), whole(1, 1 << 14)
_PATH = text(4096)

NETWORK: dict[str, Rule] = {
    **dict.fromkeys(("dim", "ffn_dim", "freq_dim", "text_dim", "image_dim"), _WIDTH),
    **dict.fromkeys(("max_frames", "max_rows", "max_columns", "text_len"), _POSITIONS),
    **dict.fromkeys(("num_heads", "in_dim", "out_dim"), whole(1, 1 << 14)),
    "num_layers": whole(1, 1000),
    "patch": listed(whole(1, 16), low=3, high=3),
    "eps": number(0, 1, above=True),
    "image_branch": _FLAG,
    "image_positions": whole(0, 4096),
    "two_times": _FLAG,
}
RECIPE: dict[str, Rule] = {
    "kind": one_of(*KINDS),
    "pattern": pattern,
    "mids": listed(listed(number(0, 1), low=0, high=1000), low=1, high=10_000),
    "sigma_max": _SIGMA,
    "noisy_context": _FLAG,
    "noisy_context_start_chunk": whole(0, 1 << 20),
    "ode_steps": whole(1, 10_000),
    "shift": _SHIFT,
    "guidance": _GUIDANCE,
    "window": optional(whole(1, 1 << 20)),
    "sinks": whole(0, 1 << 20),
}
SAMPLER: dict[str, Rule] = {
    "kind": one_of("ode", "rcm_few_step"),
    "sigma_max": _SIGMA,
    "steps": whole(1, 10_000),
    "shift": _SHIFT,
    "guidance": _GUIDANCE,
    "solver": optional(one_of("euler", "unipc", "consistency")),
}
CODEC: dict[str, Rule] = {
    "name": word(),
    "path": optional(_PATH),
    "temporal_stride": whole(1, 64),
    "spatial_stride": whole(1, 64),
    "gain": number(0, 1e6, above=True),
    "boost": number(0, 1e6, above=True),
    "centre": number(-1e6, 1e6),
}
TEXT: dict[str, Rule] = {
    "name": word(),
    "path": optional(_PATH),
    "tokenizer": optional(_PATH),
    "text_len": _POSITIONS,
    "text_dim": _WIDTH,
    "negative_prompt": text(),
    "words": listed(text(1000), low=0, high=MOST_VALUES),
}
_DTYPES = one_of("float32", "float64", "float16", "bfloat16")
ADAPTED: dict[str, Rule] = {"path": optional(_PATH), "dtype": _DTYPES, "digest": hexadecimal}
"""The weights under a set of adapters: where they were (null: random), and which they are in the
dtype of the run.
"""
ADAPTERS: dict[str, Any] = {
    "rank": whole(1, 1 << 17),
    "alpha": number(0, 1e9, above=True),
    "layers": listed(one_of(*LAYERS), low=1, high=len(LAYERS)),
    "bases": {"student": ADAPTED, "fake_score": ADAPTED},
}
EXTRA: dict[str, Any] = {
    "recipe": RECIPE,
    "sampler": SAMPLER,
    "codec": CODEC,
    "text": TEXT,
    "latent_shape": optional(listed(_POSITIONS, low=4, high=4)),
    "fps": number(0, 1000, above=True),
    "precision": {"compute": _DTYPES, "time": _DTYPES},
    "weights": one_of("ema", "live", "fake_score", "unstated"),
    "converted_from": _PATH,
    "loras": listed(_rule("an object", lambda v: isinstance(v, dict)), low=0, high=1000),
    "adapters": ADAPTERS,
}
FIELDS: dict[str, Rule | dict[str, Rule]] = {
    "stage": word(),
    "network": NETWORK,
    "network_name": word(),
    "pattern": optional(pattern),
    "schedule": bare,
    "noisy_context": bare,
    "sigma_max": optional(_SIGMA),
    "parent": optional(_PATH),
    "data_hash": optional(text()),
    "experiment": optional(text(1000)),
    "iteration": whole(0, 1 << 53),
    "versions": bare,
    "extra": bare,
}
_OPEN = ("codec", "text")
"""Parts that a newer version may say more of; what it says is refused by who builds them."""
_NULLABLE = ("recipe", "sampler", "codec", "text", "precision")


def check_description(values: Mapping[str, Any], *, source: str) -> None:
    """Raise `CheckpointError` naming `source`, the field, what it is and what it may be, unless the
    fields of a description make sense each by itself and together.
    """
    _require_bounded(values, source=source)
    for key in ("stage", "network"):
        if key not in values:
            raise CheckpointError(
                f"{source} lacks the field {key!r}; it is not a checkpoint's description"
            )
    for key in ("extra", "versions"):
        if not isinstance(values.get(key, {}), Mapping):
            raise CheckpointError(f"{source}: {key} is {_told(values[key])}, expected an object")
    _check(values, FIELDS, "", source)
    for key, version in values.get("versions", {}).items():
        _value(version, text(), f"versions.{key}", source)
    extra = values.get("extra", {})
    _check({k: v for k, v in extra.items() if k in EXTRA}, EXTRA, "extra.", source)
    _agree(values, extra, source)


def _check(
    values: Mapping[str, Any], rules: Mapping[str, Rule | dict[str, Rule]], lead: str, source: str
) -> None:
    for key, value in values.items():
        name, rule = f"{lead}{key}", rules.get(key)
        if rule is None:
            if lead.removeprefix("extra.").removesuffix(".") in _OPEN:
                continue
            raise CheckpointError(
                f"{source}: {name} is not known to this version of rcm; a newer one wrote it, or it"
                " is misspelt"
            )
        if isinstance(rule, dict):
            if value is None and key in _NULLABLE:
                continue
            if not isinstance(value, Mapping):
                raise CheckpointError(f"{source}: {name} is {_told(value)}, expected an object")
            _check(value, rule, f"{name}.", source)
        else:
            _value(value, rule, name, source)


def _value(value: Any, rule: Rule, name: str, source: str) -> None:
    if objection := rule(value):
        raise CheckpointError(f"{source}: {name} is {_told(value)}, expected {objection}")


def _told(value: Any) -> str:
    words = (
        repr(value)
        if isinstance(value, str | int | float | bool | None)
        else f"{type(value).__name__} {str(value)[:40]}"
    )
    return words if len(words) <= 80 else f"{words[:77]}..."


def _require_bounded(values: Any, *, source: str) -> None:
    """At most `MOST_VALUES` values and `MOST_CHARACTERS` characters in all."""
    count, characters, waiting = 0, 0, [values]
    while waiting:
        value = waiting.pop()
        count += 1
        if isinstance(value, Mapping):
            characters += sum(len(str(key)) for key in value)
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str):
            characters += len(value)
        if count > MOST_VALUES or characters > MOST_CHARACTERS:
            raise CheckpointError(
                f"{source} holds more than {MOST_VALUES} values or {MOST_CHARACTERS} characters; it"
                " is no description"
            )


def _agree(values: Mapping[str, Any], extra: Mapping[str, Any], source: str) -> None:
    """Relations between fields."""
    network, recipe, sampler = values["network"], extra.get("recipe"), extra.get("sampler")
    shape, described = extra.get("latent_shape"), extra.get("text") or {}
    contradiction = f"{source} contradicts itself: "
    config, built = _described_network(network, source), None
    if "adapters" in extra:
        _agree_adapters(config, extra, source)
    if recipe is not None and sampler is not None:
        raise CheckpointError(
            f"{contradiction}extra has both a recipe and a sampler; a network is causal or it is"
            " not"
        )
    if recipe is not None:
        if not {"kind", "pattern"} <= set(recipe):
            raise CheckpointError(f"{source}: extra.recipe lacks kind or pattern")
        if recipe["kind"] == "flow_map" and not network.get("two_times"):
            raise CheckpointError(
                f"{contradiction}extra.recipe.kind is 'flow_map', but network.two_times is not true"
            )
        try:
            built = SamplingRecipe.from_dict(dict(recipe))
            built.plan(0), built.plan(1)
        except ConfigError as error:
            raise CheckpointError(f"{source}: extra.recipe: {error}") from error
    if sampler is not None and values.get("pattern") is not None:
        raise CheckpointError(
            f"{contradiction}pattern is {values['pattern']!r}, but extra.sampler is for whole"
            " videos"
        )
    if shape is not None and math.prod(shape) > MOST_LATENT:
        raise CheckpointError(
            f"{source}: extra.latent_shape {shape} has more than {MOST_LATENT} values"
        )
    if shape is not None and built is not None:
        try:
            built.blocks.num_blocks(shape[1])
        except ConfigError as error:
            raise CheckpointError(
                f"{contradiction}extra.latent_shape and extra.recipe.pattern: {error}"
            ) from error
    stated = {  # where a thing is said twice: here, and there
        ("pattern", "extra.recipe.pattern"): (values.get("pattern"), (recipe or {}).get("pattern")),
        ("network.out_dim", "extra.latent_shape[0]"): (
            network.get("out_dim"),
            (shape or [None])[0],
        ),
        **{
            (f"network.{key}", f"extra.text.{key}"): (network.get(key), described.get(key))
            for key in ("text_len", "text_dim")
        },
    }
    for (here, there), (mine, theirs) in stated.items():
        if None not in (mine, theirs) and mine != theirs:
            raise CheckpointError(f"{contradiction}{here} is {mine}, {there} is {theirs}")


def _described_network(network: Mapping[str, Any], source: str) -> WanConfig | None:
    """The network, where enough is said of it."""
    if not {"dim", "ffn_dim", "num_heads", "num_layers"} <= set(network):
        return None
    try:
        return WanConfig(**{**network, "patch": tuple(network.get("patch", (1, 2, 2)))})
    except ConfigError as error:
        raise CheckpointError(f"{source} describes no possible network: {error}") from error


def _agree_adapters(config: WanConfig | None, extra: Mapping[str, Any], source: str) -> None:
    """Adapters are whole, fit the network, and say which weights they belong to."""
    adapters = extra["adapters"]
    lacking = sorted(set(ADAPTERS) - set(adapters))
    bases = {
        role: base for role, base in adapters.get("bases", {}).items() if set(base) != set(ADAPTED)
    }
    if lacking or bases or "student" not in adapters["bases"]:
        raise CheckpointError(
            f"{source}: extra.adapters needs {', '.join(ADAPTERS)}, and of each base"
            f" {', '.join(ADAPTED)}, the student's among them; it lacks"
            f" {', '.join(lacking) or 'parts of the bases'}"
        )
    if config is None or extra.get("weights") == "fake_score":
        return
    if adapters["rank"] > (most := largest_rank(adapters["layers"], config)):
        raise CheckpointError(
            f"{source} contradicts itself: extra.adapters.rank is {adapters['rank']}, the smallest"
            f" layer that they adapt has {most}"
        )
