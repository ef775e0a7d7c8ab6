"""Whether a run continues a checkpoint's: the settings that both must share, and those that may
change with a word about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from rcm.core.errors import ConfigError

_MOST_NAMED = 4


@dataclass(frozen=True)
class Settings:
    """`values`: settings by dotted key, as JSON. `changeable`: keys, or groups of keys, that may
    differ from the checkpoint's: named in one warning. Any other difference is refused.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    changeable: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The values as JSON returns them (tuples become lists)."""
        return json.loads(json.dumps(dict(self.values)))

    def require_continues(self, stored: Mapping[str, Any] | None, *, source: str) -> None:
        """ConfigError naming the keys and both values where this run does not continue one of the
        settings `stored` in `source`.

        A checkpoint without settings (written before there were any) and keys that one side does
        not know (of another version) are let through.
        """
        if not self.values:
            return
        if stored is None:
            logger.warning(
                "{} does not say with which settings it was trained; they are not compared with"
                " this run's",
                source,
            )
            return
        mine = self.record()
        different = sorted(key for key in mine.keys() & stored.keys() if mine[key] != stored[key])
        refused = [key for key in different if not self._may_change(key)]
        told = _told(refused, stored, mine)
        if refused:
            raise ConfigError(
                f"{source} was trained with other settings ({told}); give the same ones, or choose"
                " another job.name and start from its weights with model.config.student_ckpt"
            )
        if different:
            logger.warning(
                "{} was trained with other settings, this run goes on with its own: {}",
                source,
                _told(different, stored, mine),
            )

    def _may_change(self, key: str) -> bool:
        return any(key == allowed or key.startswith(f"{allowed}.") for allowed in self.changeable)


def _told(keys: list[str], stored: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    named = "; ".join(
        f"{key}: {stored[key]!r} there, {mine[key]!r} here" for key in keys[:_MOST_NAMED]
    )
    more = len(keys) - _MOST_NAMED
    return f"{named}; and {more} more" if more > 0 else named
