"""Mapping <-> frozen dataclasses, with the exact key named in every error. No Hydra here.

`read` is strict: unknown keys, wrong types, values outside an enumeration and what a record refuses
itself raise `ConfigError`; nothing is dropped or guessed. Conveniences: a float may be a fraction
("15/16"), an int may be an integral float (1e5).
"""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rcm.core.errors import ConfigError

_ELSEWHERE = {"r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
"""What other trainers call a key -> what it is called here, for advice."""


def read(cls: type, data: Mapping[str, Any], *, path: str = "") -> Any:
    """Instance of dataclass `cls` from a plain mapping, called `path` in messages."""
    if not isinstance(data, Mapping):
        names = ", ".join(f.name for f in fields(cls))
        raise ConfigError(
            f"{path or 'the config'} must be a group of keys, got {data!r}; keys: {names}"
        )
    known = {f.name: f for f in fields(cls)}
    for key in data:
        if key not in known:
            raise unknown_key(
                _join(path, str(key)), known_keys=[_join(path, name) for name in known]
            )
    hints = _hints(cls)
    values = {}
    for name, value in data.items():
        hint = _variant(known[name], data, path) or hints[name]
        values[name] = _convert(hint, value, _join(path, name))
    try:
        return cls(**values)
    except ConfigError as error:  # of the record itself, which knows its keys, not where it stands
        raise ConfigError(_join(path, str(error))) from error


def plain(value: Any) -> Any:
    """Dataclasses and tuples as nested dicts and lists (the inverse of `read`, ready for YAML)."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def get_key(config: Any, key: str) -> Any:
    """Value at a dotted path."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def with_key(config: Any, key: str, value: Any) -> Any:
    """The frozen record `config` with another value at a dotted path."""
    name, _, rest = key.partition(".")
    return replace(
        config, **{name: with_key(getattr(config, name), rest, value) if rest else value}
    )


@cache
def known_paths(cls: type, *, path: str = "") -> Mapping[str, Any]:
    """Dotted path -> default of every key below `cls`, with groups, options and variants."""
    found: dict[str, Any] = {}
    for key, f, _ in _walk(cls, path):
        found.setdefault(key, _default(f))
    return types.MappingProxyType(found)


def text_paths(cls: type) -> set[str]:
    """Dotted paths of every key below `cls` that is a text, or one of several words."""
    return {key for key, _, hint in _walk(cls, "") if hint is str or _is_word(hint)}


def list_paths(cls: type) -> set[str]:
    """Dotted paths of every key below `cls` that is a list."""
    return {
        key
        for key, _, hint in _walk(cls, "")
        if tuple in {get_origin(kind) for kind in (hint, *get_args(hint))}
    }


def unknown_key(key: str, *, known_keys: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest known ones."""
    near = suggestions(key, known_keys)
    hint = (
        f"; did you mean {' or '.join(near)}?"
        if near
        else "; `rcm train --dryrun experiment=toy_tf_c3-3` prints every key"
    )
    return ConfigError(f"unknown key {key!r}{hint}")


def suggestions(word: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Known names close to `word`: those with its last part first, then by similarity."""
    known = list(known)
    leaf = word.rsplit(".", 1)[-1]
    leaf = _ELSEWHERE.get(leaf, leaf)
    leaves = {k.rsplit(".", 1)[-1]: k for k in sorted(known, key=len, reverse=True)}
    exact = sorted(
        (k for k in known if k.rsplit(".", 1)[-1] == leaf),
        key=lambda k: -difflib.SequenceMatcher(None, word, k).ratio(),
    )
    close = difflib.get_close_matches(word, known, n=limit, cutoff=0.75)
    similar = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=limit, cutoff=0.65)]
    return list(dict.fromkeys([*exact, *close, *similar]))[:limit]


def _walk(cls: type, path: str) -> Iterator[tuple[str, Field, Any]]:
    """(dotted path, field, type) of every key below `cls`, groups included."""
    for f in fields(cls):
        here, hint = _join(path, f.name), _hints(cls)[f.name]
        yield here, f, hint
        for inner in _dataclasses_in(f, hint):
            yield from _walk(inner, here)


def _is_word(hint: Any) -> bool:
    return get_origin(hint) is Literal and all(isinstance(word, str) for word in get_args(hint))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _default(f: Field) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else None


def _dataclasses_in(f: Field, hint: Any) -> list[type]:
    if "variants" in f.metadata:
        return list(f.metadata["variants"].values())
    return [h for h in (hint, *get_args(hint)) if isinstance(h, type) and is_dataclass(h)]


def _variant(f: Field, data: Mapping[str, Any], path: str) -> type | None:
    """The class of a tagged union: the sibling key named by metadata `tag` selects it."""
    if "variants" not in f.metadata:
        return None
    variants, tag = f.metadata["variants"], f.metadata["tag"]
    if data.get(tag) not in variants:
        raise ConfigError(
            f"{_join(path, tag)}={data.get(tag)!r} must be one of {', '.join(variants)}"
        )
    return variants[data[tag]]


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if isinstance(hint, type) and is_dataclass(hint):
        return read(hint, value, path=path)
    if origin is Literal:
        return _literal(args, value, path)
    if origin is tuple:
        return _tuple(args, value, path)
    return _scalar(hint, value, path)


def _literal(allowed: tuple[Any, ...], value: Any, path: str) -> Any:
    for choice in allowed:
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return choice
    near = suggestions(str(value), [str(a) for a in allowed], limit=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{path}={value!r} must be one of {', '.join(repr(a) for a in allowed)}{hint}"
    )


def _tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}={value!r} must be a list, such as {path}=[...]")
    if args[-1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise ConfigError(f"{path}={list(value)!r} must have {len(args)} entries, got {len(value)}")
    return tuple(
        _convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
    )


def _scalar(hint: type, value: Any, path: str) -> Any:
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number (fractions such as 15/16 are fine)",
        str: "a text",
    }
    wrong = ConfigError(f"{path}={value!r} must be {names[hint]}")
    if isinstance(value, bool) or hint is bool:
        if hint is bool and isinstance(value, bool):
            return value
        raise wrong
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, int | float):  # its characters are gone: 1_3 has become 13
        raise ConfigError(
            f"{path}={value!r} is a text; write it in quotes, such as {path.rsplit('.', 1)[-1]}:"
            f' "{value}"'
        )
    if hint is int and (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    ):
        return int(value)
    if hint is float and isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            raise wrong from None
    if hint is float and isinstance(value, int | float):
        if abs(value) <= sys.float_info.max:  # whole numbers may be larger
            return float(value)
        raise ConfigError(f"{path}={value!r} must be finite")
    raise wrong
