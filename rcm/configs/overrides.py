"""Words of the command line as Hydra's overrides, texts and the release's words put right.

Text keys keep the characters that were typed: `job.name=1_3` is no 13, and a path may have '=',
'#', braces and brackets. Nothing that a word names is imported.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from rcm.configs.convert import list_paths, text_paths
from rcm.configs.release_words import RENAMED, said_here
from rcm.configs.schema import TrainConfig
from rcm.core.errors import ConfigError

_WORD = re.compile(r"(\+{0,2})([\w./@]+)=(.*)", re.DOTALL)

TIME_LAWS = {
    "rcm.utils.timestep_utils.LogNormal": ("lognormal", ("p_mean", "p_std")),
    "rcm.utils.timestep_utils.UniformShift": ("uniform_shift", ("shift",)),
}
"""The release's `_target_` of a time law -> the law here, and the numbers it takes."""

_LAW_KEYS = ("model.config.p_G", "model.config.p_D")


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """One override per word, or those that a word of the release stands for. Raises `ConfigError`
    for a word that is none, deletes a key, or asks for several runs.
    """
    return [override for word in words for override in _of_release(_checked(_read(word), word))]


def quoted(text: str) -> str:
    """`text` as a value that Hydra reads as exactly these characters."""
    return QuotedString(text, Quote.double).with_quotes()


def as_typed(key: str, text: str) -> str:
    """The word that sets a text key: Hydra's quotes inside, the shell's around them."""
    return shlex.quote(f"{key}={quoted(text)}")


@cache
def _texts() -> frozenset[str]:
    return frozenset(text_paths(TrainConfig))


@cache
def _lists() -> frozenset[str]:
    return frozenset({*list_paths(TrainConfig), "callbacks"})


def _read(word: str) -> Override:
    parser, found = OverridesParser.create(), _WORD.fullmatch(word)
    text = found if found is not None and found[2] in _texts() else None
    try:
        override = parser.parse_overrides([word])[0]
        is_text = (
            override.is_sweep_override()
            or override.is_delete()
            or isinstance(override.value(), str | None)
        )
        if not text or is_text:
            return override
    except (HydraException, ValueError) as error:
        if not text:
            advice = "write key=value (quote lists and spaces for the shell, as in 'key=[1, 2]')"
            raise ConfigError(f"cannot read override {_short(word)!r}: {advice}") from error
    assert text is not None  # others were returned, or raised
    plus, key, characters = text.groups()
    return parser.parse_overrides([f"{plus}{key}={quoted(characters.strip())}"])[0]


def _checked(override: Override, word: str) -> Override:
    if override.is_delete():
        raise ConfigError(
            f"override {_short(word)!r} deletes a key; every key has a value: set it, or choose"
            " null where null is allowed"
        )
    if override.is_sweep_override():
        key, text, meant = override.key_or_group, word.partition("=")[2], ""
        if key in _texts():
            meant = f" (or do you mean a text with a comma: {as_typed(key, text)}?)"
        elif key in _lists() and "(" not in text:
            meant = f" (or do you mean a list: {shlex.quote(f'{key}=[{text}]')}?)"
        raise ConfigError(
            f"override {_short(word)!r} asks for several runs; launch one at a time{meant}"
        )
    return override


def _of_release(override: Override) -> Iterator[Override]:
    """The override, or those that say the same here if it is one of the release."""
    key, value = override.key_or_group, override.value()
    words = said_here(key, value)
    if words is not None and override.is_add():
        raise ConfigError(f"write {key}=NAME without +")
    if words is None and key in RENAMED:
        words = (str(override.input_line).replace(key, RENAMED[key], 1),)
    if words is None:
        words = _law_words(key, value)
    if words is None:
        yield override
    else:
        yield from OverridesParser.create().parse_overrides(list(words))


def _law_words(key: str, value: Any) -> list[str] | None:
    """Overrides for a time law that is given by the release's class; None for other words."""
    law_key = key.removesuffix("._target_")
    given = value if law_key == key else {"_target_": value}
    if law_key not in _LAW_KEYS or not isinstance(given, dict) or "_target_" not in given:
        return None
    given = {str(name): number for name, number in given.items()}
    target = given.pop("_target_")
    if not isinstance(target, str) or target not in TIME_LAWS:
        laws = (f"{name} ({law_key}.law={law})" for name, (law, _) in TIME_LAWS.items())
        raise ConfigError(
            f"{law_key}._target_={target!r} is not imported; the time laws known by name are"
            f" {' and '.join(laws)}"
        )
    law, numbers = TIME_LAWS[target]
    for name in given:
        if name not in numbers:
            raise ConfigError(
                f"{law_key}.{name} is no number of {target}, which takes {', '.join(numbers)}"
            )
    told = [f"{law_key}.{name}={_number(number)}" for name, number in given.items()]
    return [f"{law_key}.law={law}", *told]


def _number(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else str(value)


def _short(word: str) -> str:
    return word if len(word) <= 200 else word[:200] + "..."
