"""Why two VBench results differ: protocol first, then dimension by dimension. The first suspicion
is the one that has moved scores most.

What moves them, in points of the total (from published pairs of rows and reports of users): short
instead of extended prompts 1.6 to 2.5 (semantic alone ten), other seeds or samples 0.1 to 0.5, the
frame rate of the files through dynamic_degree, last instead of averaged weights, missing videos
without limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_manifest import flattened, read_manifest
from rcm.evaluation.vbench_results import DimensionResult, read_results
from rcm.evaluation.vbench_score import SUITES, Suite

ROUNDING = 1.5e-4
"""Raw difference (0-1) that two decimals of a published percentage leave open, and a little of
another machine's arithmetic.
"""

PUBLISHED = "published_rows.json"


@dataclass(frozen=True)
class Side:
    """One of two results: a run with its settings, or a published row with little but its numbers.
    `counts`: videos per dimension.
    """

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


def run_side(results: str | Path, *, videos: str | Path | None = None) -> Side:
    """A scored run: the folder of results, and that of its videos for the settings (None: results
    `X_eval_results` belong to videos `X`).
    """
    results = Path(results)
    found = read_results(results)
    guessed = Path(str(results).removesuffix("_eval_results")) if videos is None else Path(videos)
    try:
        manifest = read_manifest(guessed)
    except ConfigError:
        if videos is not None:
            raise
        return Side(
            str(results),
            _raw(found),
            _counts(found),
            note="no record of how its videos were sampled",
        )
    names = list(manifest["videos"])
    samples = 1 + max((record["sample"] for record in manifest["videos"].values()), default=0)
    settings = {
        **flattened(manifest["settings"]),
        "prompts": len({name.rpartition("-")[0] for name in names}),
    }
    return Side(str(results), _raw(found), _counts(found), settings, samples)


def published_side(name: str, *, file: str | Path) -> Side:
    """The published row called `name`, or the only one whose name contains it. `ConfigError` lists
    what there is.
    """
    table = json.loads(Path(file).read_text(encoding="utf-8"))
    rows = table["rows"]
    near = [name] if name in rows else [key for key in rows if name.lower() in key.lower()]
    if len(near) != 1:
        told = (
            f"{len(near)} rows contain it: {', '.join(near[:8])}"
            if near
            else f"there are {', '.join(list(rows)[:12])}, ..."
        )
        raise ConfigError(f"no single published row {name!r}; {told}")
    row = rows[near[0]]
    raw = {
        dimension: value / 100
        for dimension, value in zip(table["dimensions"], row["values"], strict=True)
    }
    told = ", ".join(str(row[key]) for key in ("source", "date", "sampled_by") if key in row)
    return Side(near[0], raw, note=told)


def explain(mine: Side, theirs: Side, *, suite: Suite = SUITES["t2v"]) -> list[Finding]:
    """Everything that differs, the strongest suspicion first; empty where nothing does."""
    found = [*_missing(mine, theirs, suite), *_counted(mine, theirs), *_protocol(mine, theirs)]
    shared = [name for name in suite.names if name in mine.raw and name in theirs.raw]
    moved = {
        name: mine.raw[name] - theirs.raw[name]
        for name in shared
        if abs(mine.raw[name] - theirs.raw[name]) > ROUNDING
    }
    if moved:
        found += _pattern(
            moved, suite, known=mine.settings is not None and theirs.settings is not None
        )
        effects = sorted(moved, key=lambda name: -abs(_effect(suite, name, moved[name])))
        for name in effects:
            points = 100 * _effect(suite, name, moved[name])
            words = (
                f"{name}: {mine.raw[name]:.4f} and {theirs.raw[name]:.4f}, {points:+.2f} points of"
                " the total"
            )
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
    return "\n".join(
        [
            *heads,
            f"first suspicion: {first.words}",
            *(f"  then: {finding.words}" for finding in others),
        ]
    )


def _raw(found: Mapping[str, DimensionResult]) -> dict[str, float]:
    return {name: result.score for name, result in found.items()}


def _counts(found: Mapping[str, DimensionResult]) -> dict[str, int]:
    return {name: result.num_videos for name, result in found.items() if result.num_videos}


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
            found.append(
                Finding(
                    100.0,
                    f"{mark} has no result for {', '.join(lost)}; its total is of other dimensions",
                )
            )
    return found


def _counted(mine: Side, theirs: Side) -> list[Finding]:
    differing = [
        name
        for name in mine.counts
        if name in theirs.counts and mine.counts[name] != theirs.counts[name]
    ]
    words = [f"{name} {mine.counts[name]} and {theirs.counts[name]}" for name in differing]
    return (
        [Finding(50.0, f"other numbers of scored videos (A and B): {', '.join(words)}")]
        if words
        else []
    )


_QUESTIONS = (
    (
        "extended_prompts",
        40.0,
        "one side's videos were made from extended prompts, the other's from short ones",
    ),
    ("checkpoint.weights", 30.0, "averaged (EMA) against last weights"),
    ("weights", 30.0, "averaged (EMA) against last weights"),
    ("fps", 25.0, "frame rate of the files, by which dynamic_degree picks frames"),
    ("size", 20.0, "resolution"),
    ("num_frames", 20.0, "number of frames"),
    ("prompts", 20.0, "number of prompts sampled"),
    ("crf", 10.0, "quality of the video files"),
    ("seed", 5.0, "seeds"),
)


def _protocol(mine: Side, theirs: Side) -> list[Finding]:
    """Settings that differ; the ones with a known effect in words of their own."""
    if mine.settings is None or theirs.settings is None:
        return []
    found, asked = [], {key for key, _, _ in _QUESTIONS}
    for key, weight, words in _QUESTIONS:
        a, b = mine.settings.get(key), theirs.settings.get(key)
        if a != b:
            found.append(Finding(weight, f"{words}: {key}={a!r} in A, {b!r} in B"))
    if mine.samples != theirs.samples:
        found.append(
            Finding(15.0, f"samples per prompt: {mine.samples} in A, {theirs.samples} in B")
        )
    for key in sorted(set(mine.settings) | set(theirs.settings)):
        if key not in asked and mine.settings.get(key) != theirs.settings.get(key):
            weight = 8.0 if key.startswith("recipe.") else 3.0
            found.append(
                Finding(
                    weight,
                    f"{key}={mine.settings.get(key)!r} in A, {theirs.settings.get(key)!r} in B",
                )
            )
    return found


def _pattern(moved: Mapping[str, float], suite: Suite, *, known: bool) -> list[Finding]:
    """What the pattern of differences looks like, where the settings of a side are not known."""
    if known:
        return []
    found = []
    semantic = [
        v
        for name, v in moved.items()
        if suite[name].group == "semantic"
        and name in ("multiple_objects", "scene", "human_action", "color")
    ]
    if len(semantic) >= 3 and (all(v > 0.02 for v in semantic) or all(v < -0.02 for v in semantic)):
        lower = "A" if semantic[0] < 0 else "B"
        found.append(
            Finding(
                35.0,
                f"objects, scenes and actions are all lower in {lower}: its videos look as if made"
                " from short, not extended prompts",
            )
        )
    if abs(moved.get("dynamic_degree", 0.0)) > 0.1 and len(moved) <= 3:
        found.append(
            Finding(
                24.0,
                "dynamic_degree alone moves much: look at the frame rate written into the files",
            )
        )
    if abs(moved.get("human_action", 0.0)) > 0.5:
        found.append(
            Finding(
                45.0,
                "human_action collapses where file names are not the original prompts: it reads its"
                " label from the name",
            )
        )
    return found
