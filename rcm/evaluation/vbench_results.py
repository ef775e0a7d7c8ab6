"""Per-dimension results of VBench: reading what its commands write, and what became of every
video.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError

SUFFIX = "_eval_results.json"


@dataclass(frozen=True)
class DimensionResult:
    """What VBench says of one dimension: its score (0-1), the number of videos in it, the file that
    says so.
    """

    score: float
    num_videos: int
    file: str
    videos: Mapping[str, Any]


def read_results(folder: str | Path) -> dict[str, DimensionResult]:
    """The results of every `*_eval_results.json` in `folder`, by dimension. The spelling with
    spaces is understood.

    Raises `ConfigError` naming the dimension for one that two files hold, one whose score is
    missing or no finite number (NaN is what a dimension without videos gives), and for a folder
    without results.
    """
    folder = Path(folder)
    found: dict[str, DimensionResult] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        for key, value in _object(path).items():
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


def _object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must hold an object of dimensions, got a {type(value).__name__}")
    return value


def _result(name: str, value: Any, path: Path) -> DimensionResult:
    score, videos = (
        (value[0], value[1] if len(value) > 1 else [])
        if isinstance(value, list) and value
        else (value, [])
    )
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ConfigError(
            f"{path.name} gives {score!r} for {name}, no finite number; were its videos found?"
            " Score it again"
        )
    entries = (
        [v for v in videos if isinstance(v, Mapping) and "video_path" in v]
        if isinstance(videos, list)
        else []
    )
    return DimensionResult(
        float(score),
        len(entries),
        path.name,
        {Path(v["video_path"]).name: v.get("video_results") for v in entries},
    )
