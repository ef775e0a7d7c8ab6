"""Pages of the offline suite: curves and worst clips of one folder, and the comparison of several,
written through `rcm.evaluation.report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm.evaluation.compare import Comparison, Interval
from rcm.evaluation.metrics_suite import BY_NAME, METRICS, ClipScores, mean_scores, worst
from rcm.evaluation.report import write_report

_SHOWN = ("motion", "flicker", "jump", "detail", "noise", "cut", "consistency")


def write_metrics_page(
    folder: Path,
    scores: Mapping[str, ClipScores],
    *,
    title: str,
    subtitle: str = "",
    machine: Mapping[str, Any],
) -> Path:
    """`report.html` in the `folder` of the videos that `scores` names: means, the worst clips of
    every judging metric, their curves.
    """
    means = mean_scores(list(scores.values()))
    picked = dict.fromkeys(
        name
        for m in METRICS
        if m.judges and m.name in means
        for name in worst(scores, m.name, count=1)
    )
    rows = [
        {"stage": name, "scores": {m: scores[name].values[m] for m in means}} for name in picked
    ]
    tables = [
        {
            "title": f"Mean of {len(scores)} clips",
            "rows": [{"stage": "mean", "scores": means}],
            "note": _legend(means),
        },
        {
            "title": "Worst clips",
            "rows": rows,
            "better": _better(means),
            "note": "Every clip that some metric finds worst.",
        },
    ]
    stages = [
        {
            "name": name,
            "history": {
                c: [[i, v] for i, v in enumerate(scores[name].curves[c])]
                for c in _SHOWN
                if c in scores[name].curves
            },
        }
        for name in picked
    ]
    videos = [
        {"title": name, "path": name, "caption": _why(scores, name, means), "group": "Worst clips"}
        for name in picked
    ]
    data = {
        "title": title,
        "subtitle": subtitle,
        "machine": dict(machine),
        "tables": tables,
        "stages": stages,
        "videos": videos,
    }
    return write_report(folder, data)


def write_comparison_page(
    folder: Path,
    comparison: Comparison,
    grids: Sequence[Mapping[str, str]],
    *,
    title: str,
    machine: Mapping[str, Any],
) -> Path:
    """`report.html` in `folder`: means with intervals, paired differences, and the grid of videos
    (`grids`: entries of a report's videos).
    """
    metrics = list(comparison.means[comparison.reference])
    means = [
        {"stage": name, "scores": {m: _told(by_metric[m]) for m in metrics}}
        for name, by_metric in comparison.means.items()
    ]
    paired = [
        {"stage": name, "scores": {m: _told(by_metric[m], sense=BY_NAME[m].worse) for m in metrics}}
        for name, by_metric in comparison.differences.items()
    ]
    about = (
        f"{len(comparison.videos)} videos, same prompts and noise; 95 % bootstrap intervals over"
        " videos."
    )
    tables = [
        {"title": "Means", "rows": means, "note": f"{about} {_legend(metrics)}"},
        {
            "title": f"Differences to {comparison.reference}, video by video",
            "rows": paired,
            "note": (
                "A word stands where the interval excludes zero: better or worse than the"
                " reference."
            ),
        },
    ]
    return write_report(
        folder,
        {
            "title": title,
            "machine": dict(machine),
            "tables": tables,
            "videos": [dict(grid) for grid in grids],
        },
    )


def _told(interval: Interval, *, sense: str | None = None) -> str:
    """The interval as text; with `sense` ("higher" or "lower" is worse) the word better or worse
    where it excludes zero.
    """
    text = f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
    if sense is None or not interval.excludes_zero:
        return text
    return f"{text} {'worse' if (interval.mean > 0) == (sense == 'higher') else 'better'}"


def _better(names: Mapping[str, float]) -> dict[str, str]:
    return {
        name: "lower" if BY_NAME[name].worse == "higher" else "higher"
        for name in names
        if BY_NAME[name].judges
    }


def _legend(names: Mapping[str, float] | Sequence[str]) -> str:
    words = "; ".join(
        f"{name}: sees {BY_NAME[name].sees}, blind to {BY_NAME[name].blind}" for name in names
    )
    return f"An offline suite of its own, not VBench. {words}."


def _why(scores: Mapping[str, ClipScores], name: str, means: Mapping[str, float]) -> str:
    found = [
        m.name
        for m in METRICS
        if m.judges and m.name in means and worst(scores, m.name, count=1) == [name]
    ]
    return f"worst by {', '.join(found)}"
