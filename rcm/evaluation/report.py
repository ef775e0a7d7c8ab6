"""What a run leaves behind: `report.json`, and a page that shows the same numbers and the videos,
in one file without scripts or outside resources.

The data is a plain dict:

    title, subtitle      text
    status               what is still going on, for a page that is written again; "" or left out
                         when all is done
    machine              {name: text or number}
    stages               [{name, about, seconds, gate, passed, history, expect, scores}]: `about`
                         what the stage is; `gate` its sentence, `passed` True, False or None (no
                         gate); `history` {curve: [[step, loss], ...]}, `expect` what these should
                         look like; `scores` {name: number}
    tables               [{title, note, better, section, rows: [{stage, steps, scores: {column:
                         number}}]}]; `better` {column: "lower" or "higher"} marks the best of a
                         column; `section` "measured" puts it below the charts
    charts               [{title, note, x, y, lines: [{name, points, colour}]}]: curves in one
                         frame; `x`, `y` name the axes
    videos               [{title, caption, facts, path, group, beside, section}]: a grid
                         with a row per `group` and a column per `title`; `path` relative to the
                         folder, an .mp4 or a picture; `facts` short texts below it; `beside` a
                         larger one that opens at a click; `section` "drift" shows it there, not in
                         the grid
    glossary             {term: its meaning}

Only `name` of a stage, `rows` of a table, `lines` of a chart and `path` of a video are required.
Files up to `EMBEDDED_BYTES` become part of the page, so that it can be sent on alone; larger ones
are linked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.evaluation.sections import render
from rcm.train.describe import write_atomically

EMBEDDED_BYTES = 2_000_000
"""Size up to which a video or picture is written into the page."""


def write_report(folder: str | Path, data: Mapping[str, Any]) -> Path:
    """Write `report.json` and `report.html` into `folder`, each atomically; returns the page.

    `ConfigError` naming the key for a value that JSON does not know. Numbers that are not finite
    become "nan", "inf", "-inf"; the page says which videos are missing.
    """
    folder = Path(folder)
    plain = _plain(data, "report")
    page = render(plain, folder=folder, embedded_bytes=EMBEDDED_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def _plain(value: Any, where: str) -> Any:
    """As JSON would return it; non-finite numbers as words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    raise ConfigError(
        f"{where} is a {type(value).__name__}, expected numbers, text, lists and mappings (call"
        " float() on tensors)"
    )
