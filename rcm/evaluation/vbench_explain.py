"""Why two VBench results differ: protocol first, then dimension by dimension. The first suspicion
is the one that has moved scores most.

What moves them, in points of the total (from published pairs of rows and reports of users): short
instead of extended prompts 1.6 to 2.5 (semantic alone ten), other seeds or samples 0.1 to 0.5, the
frame rate of the files through dynamic_degree, last instead of averaged weights, missing videos
without limit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_manifest import read_manifest
from rcm.evaluation.vbench_results import read_results
from rcm.evaluation.vbench_score import SUITES, Suite
from rcm.storage.state_dicts import flatten

ROUNDING = 1.5e-4
"""Raw difference that two printed decimals of a percentage, and other machines, leave open."""

PUBLISHED = "published_rows.json"


@dataclass(frozen=True)
class Side:
    """A run with its settings, or a published row. `counts`: videos per dimension."""

    name: str
    raw: Mapping[str, float]
    counts: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    samples: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A difference: how much it can matter (larger first), in words."""

    weight: float
    words: str


def run_side(results: str | Path) -> Side:
    """A scored run; results `X_eval_results` belong to videos `X`."""
    results = Path(results)
    found = read_results(results)
    side = Side(
        str(results),
        {name: result.score for name, result in found.items()},
        {name: result.num_videos for name, result in found.items() if result.num_videos},
    )
    try:
        manifest = read_manifest(os.path.abspath(results).removesuffix("_eval_results"))
    except ConfigError as error:
        return replace(side, note=f"no record of how its videos were sampled: {error}")
    videos_made = manifest["videos"]
    samples = 1 + max((record["sample"] for record in videos_made.values()), default=0)
    prompts = len({name.rpartition("-")[0] for name in videos_made})
    settings = {**flatten(manifest["settings"]), "prompts": prompts}
    return replace(side, settings=settings, samples=samples)


def published_side(name: str, *, file: str | Path) -> Side:
    """The published row called `name`, or the only one whose name contains it."""
    table = json.loads(Path(file).read_text(encoding="utf-8"))
    rows = table["rows"]
    near = [name] if name in rows else [key for key in rows if name.lower() in key.lower()]
    if len(near) != 1:
        told = f"there are {', '.join(list(rows)[:12])}, ..."
        if near:
            told = f"{len(near)} rows contain it: {', '.join(near[:8])}"
        raise ConfigError(f"no single published row {name!r}; {told}")
    row = rows[near[0]]
    raw = {key: x / 100 for key, x in zip(table["dimensions"], row["values"], strict=True)}
    told = ", ".join(str(row[key]) for key in ("source", "date", "sampled_by") if key in row)
    return Side(near[0], raw, note=told)


def explain(mine: Side, theirs: Side, *, suite: Suite = SUITES["t2v"]) -> list[Finding]:
    """Everything that differs, the strongest suspicion first; empty where nothing does."""
    found = [*_missing(mine, theirs, suite), *_counted(mine, theirs), *_protocol(mine, theirs)]
    shared = [name for name in suite.names if name in mine.raw and name in theirs.raw]
    gaps = {name: mine.raw[name] - theirs.raw[name] for name in shared}
    moved = {name: gap for name, gap in gaps.items() if abs(gap) > ROUNDING}
    if mine.settings is None or theirs.settings is None:
        found += _pattern(moved)
    for name in sorted(moved, key=lambda name: -abs(_effect(suite, name, moved[name]))):
        points = 100 * _effect(suite, name, moved[name])
        both = f"{mine.raw[name]:.4f} and {theirs.raw[name]:.4f}"
        words = f"{name}: {both}, {points:+.2f} points of the total"
        found.append(Finding(min(0.9, abs(points)), words))
    return sorted(found, key=lambda finding: -finding.weight)


def told(findings: list[Finding], mine: Side, theirs: Side) -> str:
    """The findings as text, the first suspicion named as such."""
    heads = [
        f"{mark} = {side.name}" + (f" ({side.note})" if side.note else "")
        for mark, side in (("A", mine), ("B", theirs))
    ]
    if not findings:
        return "\n".join([*heads, "no difference beyond rounding in scores or settings"])
    first, *others = findings
    lines = [f"first suspicion: {first.words}", *(f"  then: {other.words}" for other in others)]
    return "\n".join([*heads, *lines])


def _effect(suite: Suite, name: str, difference: float) -> float:
    """Change of the total for a raw difference of one dimension."""
    dimension = suite[name]
    weight = sum(d.weight for d in suite.dimensions if d.group == dimension.group)
    share = suite.group_weights[dimension.group] / sum(suite.group_weights.values())
    return difference / (dimension.high - dimension.low) * dimension.weight / weight * share


def _missing(mine: Side, theirs: Side, suite: Suite) -> list[Finding]:
    found = []
    for mark, side, other in (("A", mine, theirs), ("B", theirs, mine)):
        lost = [name for name in suite.names if name not in side.raw and name in other.raw]
        if lost:
            words = f"{mark} has no result for {', '.join(lost)}; its total is of other dimensions"
            found.append(Finding(100.0, words))
    return found


def _counted(mine: Side, theirs: Side) -> list[Finding]:
    both = {name: (a, theirs.counts.get(name, a)) for name, a in mine.counts.items()}
    words = [f"{name} {a} and {b}" for name, (a, b) in both.items() if a != b]
    if not words:
        return []
    return [Finding(50.0, f"other numbers of scored videos (A and B): {', '.join(words)}")]


_EMA = (30.0, "averaged (EMA) against last weights")
_QUESTIONS = {
    "extended_prompts": (40.0, "videos made from extended prompts against ones from short ones"),
    "checkpoint.weights": _EMA,
    "weights": _EMA,
    "fps": (25.0, "frame rate of the files, by which dynamic_degree picks frames"),
    "size": (20.0, "resolution"),
    "num_frames": (20.0, "number of frames"),
    "prompts": (20.0, "number of prompts sampled"),
    "crf": (10.0, "quality of the video files"),
    "seed": (5.0, "seeds"),
}
"""Setting -> weight of a difference in it, words for it."""


def _protocol(mine: Side, theirs: Side) -> list[Finding]:
    """Settings that differ; the ones with a known effect in words of their own."""
    if mine.settings is None or theirs.settings is None:
        return []
    found = []
    others = sorted(({*mine.settings} | {*theirs.settings}) - {*_QUESTIONS})
    for key in (*_QUESTIONS, *others):
        a, b = mine.settings.get(key), theirs.settings.get(key)
        weight, words = _QUESTIONS.get(key, (8.0 if key.startswith("recipe.") else 3.0, ""))
        if a != b:
            words = f"{words}: " if words else ""
            found.append(Finding(weight, f"{words}{key}={a!r} in A, {b!r} in B"))
    if mine.samples != theirs.samples:
        words = f"samples per prompt: {mine.samples} in A, {theirs.samples} in B"
        found.append(Finding(15.0, words))
    return found


def _pattern(moved: Mapping[str, float]) -> list[Finding]:
    """What the pattern of differences looks like, where the settings of a side are not known."""
    found = []
    named = ("multiple_objects", "scene", "human_action", "color")
    semantic = [v for name, v in moved.items() if name in named]
    if len(semantic) >= 3 and (min(semantic) > 0.02 or max(semantic) < -0.02):
        words = (
            f"objects, scenes and actions are all lower in {'A' if semantic[0] < 0 else 'B'}: its"
            " videos look as if made from short, not extended prompts"
        )
        found.append(Finding(35.0, words))
    if abs(moved.get("dynamic_degree", 0.0)) > 0.1 and len(moved) <= 3:
        words = "dynamic_degree alone moves much: look at the frame rate written into the files"
        found.append(Finding(24.0, words))
    if abs(moved.get("human_action", 0.0)) > 0.5:
        words = (
            "human_action collapses where file names are not the original prompts: it reads its"
            " label from the name"
        )
        found.append(Finding(45.0, words))
    return found
