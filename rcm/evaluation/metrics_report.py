"""Pages of the offline suite: one folder's curves and worst clips; a comparison of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm.evaluation.compare import Comparison, Interval
from rcm.evaluation.metrics_suite import BY_NAME, METRICS, ClipScores, mean_scores, worst
from rcm.evaluation.report import write_report

_SHOWN = ("motion", "flicker", "jump", "detail", "noise", "cut", "consistency")


def write_metrics_page(
    folder: Path, scores: Mapping[str, ClipScores], *, title: str, machine: Mapping[str, Any]
) -> Path:
    """`report.html` beside the videos of `scores`: means, worst clips and their curves."""
    means = mean_scores(list(scores.values()))
    blamed: dict[str, list[str]] = {}
    for metric in METRICS:
        if metric.judges and metric.name in means:
            for name in worst(scores, metric.name, count=1):
                blamed.setdefault(name, []).append(metric.name)
    rows = {name: {m: scores[name].values[m] for m in means} for name in blamed}
    note = "Every clip that some metric finds worst."
    data = {
        "title": title,
        "machine": dict(machine),
        "tables": [
            _table(f"Mean of {len(scores)} clips", {"mean": means}, note=_legend(means)),
            _table("Worst clips", rows, better=_better(means), note=note),
        ],
        "stages": [{"name": name, "history": _curves(scores[name])} for name in blamed],
        "videos": [
            {
                "title": name,
                "path": name,
                "caption": f"worst by {', '.join(metrics)}",
                "group": "Worst clips",
            }
            for name, metrics in blamed.items()
        ],
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
    """`report.html` with means, paired differences and `grids`, entries of a report's videos."""
    metrics = list(comparison.means[comparison.reference])
    means = {
        name: {m: _told(found[m]) for m in metrics} for name, found in comparison.means.items()
    }
    senses = {m: BY_NAME[m].worse if BY_NAME[m].judges else None for m in metrics}
    paired = {
        name: {m: _told(found[m], sense=senses[m]) for m in metrics}
        for name, found in comparison.differences.items()
    }
    about = (
        f"{len(comparison.videos)} videos, same prompts and noise; 95 % bootstrap intervals over"
        " videos."
    )
    data = {
        "title": title,
        "machine": dict(machine),
        "tables": [
            _table("Means", means, note=f"{about} {_legend(metrics)}"),
            _table(
                f"Differences to {comparison.reference}, video by video",
                paired,
                note="A word stands where the interval excludes zero and the number judges:"
                " better or worse than the reference.",
            ),
        ],
        "videos": [dict(grid) for grid in grids],
    }
    return write_report(folder, data)


def _curves(clip: ClipScores) -> dict[str, list[list[float]]]:
    """The curves that are shown, [[frame, value], ...] each."""
    shown = {name: clip.curves[name] for name in _SHOWN if name in clip.curves}
    return {name: [[i, v] for i, v in enumerate(values)] for name, values in shown.items()}


def _table(title: str, rows: Mapping[str, Mapping[str, Any]], **about: Any) -> dict[str, Any]:
    """A report's table of one row per name."""
    listed = [{"stage": name, "scores": scores} for name, scores in rows.items()]
    return {"title": title, "rows": listed, **about}


def _told(interval: Interval, *, sense: str | None = None) -> str:
    """The interval as text; better or worse is said where it excludes zero (`sense` is worse)."""
    text = f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
    if sense is None or not interval.excludes_zero:
        return text
    return f"{text} {'worse' if (interval.mean > 0) == (sense == 'higher') else 'better'}"


def _better(names: Mapping[str, float]) -> dict[str, str]:
    other = {"higher": "lower", "lower": "higher"}
    return {name: other[BY_NAME[name].worse] for name in names if BY_NAME[name].judges}


def _legend(names: Mapping[str, float] | Sequence[str]) -> str:
    words = "; ".join(
        f"{name}: sees {BY_NAME[name].sees}, blind to {BY_NAME[name].blind}" for name in names
    )
    return f"An offline suite of its own, not VBench. {words}."
