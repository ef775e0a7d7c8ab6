"""Frozen records of settings that check themselves: the numbers that a key may be stand beside
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from rcm.core.errors import ConfigError


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
    """Base of settings. Raises `ConfigError` "KEY=VALUE must be ..." for a number outside the
    bounds of its field; who knows where the record stands puts the path before it
    (`rcm.configs.convert.read`). A record with more to say extends `__post_init__`.
    """

    def __post_init__(self) -> None:
        for key in fields(self):
            least, above, most = key.metadata.get("bounds", (None, None, None))
            value = getattr(self, key.name)
            if least is not None and value < least:
                raise ConfigError(f"{key.name}={value} must be at least {least}")
            if above is not None and not value > above:
                raise ConfigError(
                    f"{key.name}={value} must be {f'above {above:g}' if above else 'positive'}"
                )
            if most is not None and value > most:
                raise ConfigError(f"{key.name}={value} must be at most {most}")
