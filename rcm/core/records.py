"""Frozen records of settings that check themselves: of what kind a key is, and the numbers that it
may be, stand beside it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rcm.core.errors import ConfigError


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can be
        return False


_SCALARS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: isinstance(v, Integral) and not isinstance(v, bool)),
    float: (
        "a finite number",
        lambda v: isinstance(v, Real) and not isinstance(v, bool) and _is_finite(v),
    ),
    str: ("a text", lambda v: isinstance(v, str)),
    type(None): ("None", lambda v: v is None),
}


def within(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A field of a `Record` whose number is at least `least` or above `above`, and at most
    `most`.
    """
    return field(default=default, metadata={"bounds": (least, above, most)})


@dataclass(frozen=True)
class Record:
    """Base of settings. Raises `ConfigError` "KEY=VALUE must be ..." for a value of another kind
    than its field says, and for a number that is outside the bounds of its field; who knows where
    the record stands puts the path before it (`rcm.configs.convert.read`). A record with more to
    say extends `__post_init__`.
    """

    def __post_init__(self) -> None:
        check_kinds(self)
        for key in fields(self):
            least, above, most = key.metadata.get("bounds", (None, None, None))
            value = getattr(self, key.name)
            if value is None:
                continue
            if least is not None and value < least:
                raise ConfigError(f"{key.name}={value} must be at least {least}")
            if above is not None and not value > above:
                raise ConfigError(
                    f"{key.name}={value} must be {f'above {above:g}' if above else 'positive'}"
                )
            if most is not None and value > most:
                raise ConfigError(f"{key.name}={value} must be at most {most}")


def check_kinds(record: Any, *, prefix: str = "") -> None:
    """`require_kind` of every field of a dataclass, called `prefix` + field; not of those whose
    class a sibling names, which are read as that class (`rcm.configs.convert`).
    """
    hints = _hints(record.__class__)
    for key in fields(record):
        if "variants" not in key.metadata:
            require_kind(prefix + key.name, getattr(record, key.name), hints[key.name])


def require_kind(name: str, value: Any, kind: Any) -> None:
    """`ConfigError` "NAME=VALUE must be ..." unless `value` is of `kind`: a class, a protocol, or a
    form of `typing`. True and False are no numbers, and numbers are finite.
    """
    if not _fits(kind, value):
        raise ConfigError(f"{name}={_shown(value)} {_objection(kind)}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(kind: Any, value: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(one, value) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_fits(args[0], v) for v in value)
        return len(value) == len(args) and all(map(_fits, args, value))
    if origin is Callable:
        return callable(value)
    if kind in _SCALARS:
        return _SCALARS[kind][1](value)
    cls = origin or kind
    if getattr(cls, "_is_protocol", False):
        return not isinstance(value, type) and all(hasattr(value, name) for name in _asked(cls))
    return isinstance(value, cls)


@cache
def _asked(protocol: type) -> tuple[str, ...]:
    """What an object of a protocol has."""
    found = [name for cls in protocol.__mro__ for name in (*vars(cls), *_notes(cls))]
    return tuple(sorted({name for name in found if not name.startswith("_")}))


def _notes(cls: type) -> dict[str, Any]:
    return cls.__dict__.get("__annotations__", {})


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "(a number of thousands of digits)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _objection(kind: Any) -> str:
    words = [one for one in get_args(kind) or (kind,) if get_origin(one) is Literal]
    if get_origin(kind) is Literal or words:
        allowed = get_args(kind) if get_origin(kind) is Literal else get_args(words[0])
        left_out = "" if get_origin(kind) is Literal else ", and may be left out"
        return f"is not one of {', '.join(map(repr, allowed))}{left_out}"
    return f"must be {_told(kind)}"


def _told(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_told, args)))
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a tuple, of which each is {_told(args[0])}"
        return f"a tuple of {len(args)}, each {' or '.join(dict.fromkeys(map(_told, args)))}"
    if origin is Callable:
        return "a function"
    if kind in _SCALARS:
        return _SCALARS[kind][0]
    return f"a {(origin or kind).__name__}"
