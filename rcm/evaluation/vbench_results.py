"""Per-dimension results of VBench, as its commands write them, and the files that they are of."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.core.text_file import read_text
from rcm.storage.json_file import keys_once

SUFFIX = "_eval_results.json"


@dataclass(frozen=True)
class DimensionResult:
    """VBench's result for a dimension: score (0-1), file, result by video (empty: not told)."""

    score: float
    file: str
    videos: Mapping[str, Any]

    @property
    def num_videos(self) -> int:
        return len(self.videos)


def read_results(folder: str | Path) -> dict[str, DimensionResult]:
    """The results of every `*_eval_results.json` in `folder`, by dimension, also with spaces.

    `ConfigError` for a dimension that is given twice or without a finite score (NaN: without
    videos), for a video that counts twice, and for a folder without results.
    """
    folder = Path(folder)
    found: dict[str, DimensionResult] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        held = read_json(path, what="result of VBench")
        if not isinstance(held, Mapping):
            raise ConfigError(
                f"{path} must hold an object of dimensions, got a {type(held).__name__}"
            )
        for key, value in held.items():
            name = key.replace(" ", "_")
            if name in found:
                raise ConfigError(
                    f"{name} is in {found[name].file} and in {path.name}; keep one of them in"
                    f" {folder}"
                )
            found[name] = _result(name, value, path)
    if not found:
        raise ConfigError(
            f"no *{SUFFIX} in {folder}; score the dimensions first, or give the folder that has"
            " them"
        )
    return found


def read_json(path: Path, *, what: str) -> Any:
    """The value in a JSON file of another program, NaN among it; `ConfigError` for anything else,
    and for a key given twice.
    """
    return json_value(read_text(path, what=what), source=path)


def json_value(text: str, *, source: object) -> Any:
    """As `read_json`, of a text; `source` says where it stands."""
    try:
        return json.loads(text, object_pairs_hook=keys_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON: {str(error)[:200]}") from error


def finite_number(value: Any) -> bool:
    """Whether a result is a number that a float holds, neither infinite nor NaN."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _result(name: str, value: Any, path: Path) -> DimensionResult:
    score, *more = value if isinstance(value, list) and value else (value,)
    if not finite_number(score):
        raise ConfigError(
            f"{path.name} gives {repr(score)[:40]} for {name}, no finite number; were its videos"
            " found? Score it again, or take the key out if it is no dimension"
        )
    # camera_motion has its means by kind of motion in between
    listed = next((part for part in more if isinstance(part, list)), [])
    entries = [v for v in listed if isinstance(v, Mapping) and isinstance(v.get("video_path"), str)]
    names = Counter(Path(entry["video_path"]).name for entry in entries)
    twice = next((video for video, count in names.items() if count > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{path.name} counts {twice!r} {names[twice]} times in {name}; score it again"
        )
    results = {Path(entry["video_path"]).name: entry.get("video_results") for entry in entries}
    return DimensionResult(float(score), path.name, results)
