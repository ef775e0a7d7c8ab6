"""Per-dimension results of VBench, as its commands write them."""

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
    """VBench's result for a dimension: score (0-1), number of videos, file, result by video."""

    score: float
    num_videos: int
    file: str
    videos: Mapping[str, Any]


def read_results(folder: str | Path) -> dict[str, DimensionResult]:
    """The results of every `*_eval_results.json` in `folder`, by dimension, also with spaces.

    `ConfigError` for a dimension in two files or without a finite score (NaN: without videos), and
    for a folder without results.
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


def finite_number(value: Any) -> bool:
    """Whether a result is a number, neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must hold an object of dimensions, got a {type(value).__name__}")
    return value


def _result(name: str, value: Any, path: Path) -> DimensionResult:
    score, *more = value if isinstance(value, list) and value else (value,)
    if not finite_number(score):
        raise ConfigError(
            f"{path.name} gives {score!r} for {name}, no finite number; were its videos found?"
            " Score it again"
        )
    videos = more[0] if more and isinstance(more[0], list) else []
    entries = [v for v in videos if isinstance(v, Mapping) and "video_path" in v]
    return DimensionResult(
        float(score),
        len(entries),
        path.name,
        {Path(v["video_path"]).name: v.get("video_results") for v in entries},
    )
