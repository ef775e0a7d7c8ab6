"""JSON from strangers: strict, bounded, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rcm.core.errors import CheckpointError, first_line

MOST_BYTES = 1 << 26
"""64 MiB: an index of a million shards' tensors is smaller."""


def parse_json(text: str | bytes, *, source: Path | str) -> Any:
    """The value of a JSON text in UTF-8. `CheckpointError` naming `source` for anything else, for a
    key given twice, and for numbers that JSON does not have (NaN, Infinity) or a float64 does not
    hold.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        return json.loads(
            decoded, object_pairs_hook=keys_once, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError as error:
        raise CheckpointError(f"{source} cannot be read: its JSON is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(
            f"{source} cannot be read ({first_line(error)}); it is not JSON as this package"
            " reads it"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; errors as `parse_json`, also for another value and for a file that
    cannot be opened or has more than `MOST_BYTES`.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no file but a folder, a pipe or a device")
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, more than the {MOST_BYTES} that such a"
                " file may have"
            )
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    found = parse_json(content, source=path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object of settings")
    return found


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook`; `ValueError` for a key given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is given twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{word[:40]} is no finite number")
    return number
