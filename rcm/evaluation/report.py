"""What a run leaves behind: `report.json` and a page that shows the same numbers, in one file without scripts or outside resources.

The data is a plain dict:

    title, subtitle      text
    machine              {name: text or number}
    stages               [{name, seconds, gate, passed, history, scores, note}]: `gate` is its sentence, `passed` True, False or None (no
                         gate); `history` [[step, loss], ...] or {curve: [[step, loss], ...]}; `scores` {name: number}
    tables               [{title, note, better, rows: [{stage, steps, scores: {column: number}}]}]; `better` {column: "lower" or "higher"}
                         marks the best of a column
    videos               [{title, caption, path, poster, group}]: `path` relative to the folder, an .mp4 or a picture; `poster` a picture
                         for viewers that play no mp4; videos of one `group` stand side by side under its name

Only `name` of a stage, `rows` of a table and `path` of a video are required.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from rcm.core.errors import ConfigError
from rcm.evaluation.charts import line_chart
from rcm.evaluation.page import PAGE
from rcm.train.describe import write_atomically

KEYS = {
    "": {"title", "subtitle", "machine", "stages", "tables", "videos"},
    "stages": {"name", "seconds", "gate", "passed", "history", "scores", "note"},
    "tables": {"title", "note", "better", "rows"},
    "rows": {"stage", "steps", "scores"},
    "videos": {"title", "caption", "path", "poster", "group"},
}
_REQUIRED = {"stages": ("name",), "tables": ("rows",), "rows": ("stage", "scores"), "videos": ("path",)}
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")


def write_report(folder: str | Path, data: Mapping[str, Any]) -> Path:
    """Write `report.json` and `report.html` into `folder` (made if needed), each atomically; returns the page's path.

    Raises `ConfigError` for data of another form (naming the key), `OSError` with the path where it cannot be written. Numbers that are not
    finite are written as "nan", "inf", "-inf". A video whose file is missing is said to be missing, on the page.
    """
    folder = Path(folder)
    _check(data)
    plain = _plain(data, "report")
    page = render(plain, folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def render(data: Mapping[str, Any], *, folder: Path) -> str:
    """The page of checked, plain data; `folder` is only asked which videos exist."""
    stages, tables, videos = data.get("stages", ()), data.get("tables", ()), data.get("videos", ())
    sections = [
        _verdict(stages),
        _section("Stages", _stage_table(stages) if stages else ""),
        _section("Scores", "".join(_score_table(table) for table in tables)),
        _section("Samples", _samples(videos, folder)),
        _section("Loss curves", _curves(stages)),
        _section("Machine", _facts(data.get("machine", {}))),
    ]
    title = escape(data.get("title", "Report"))
    subtitle = f'<p class="quiet">{escape(data["subtitle"])}</p>' if data.get("subtitle") else ""
    return PAGE.replace("{{title}}", title).replace("{{body}}", f"<h1>{title}</h1>{subtitle}" + "".join(sections))


def number(value: Any) -> str:
    """A value as a table cell's inside: four significant digits, the exact number as its tooltip; text is escaped, None a dash."""
    if value is None:
        return "&ndash;"
    if isinstance(value, float):
        shown = f"{value:.4g}"
        return shown if float(shown) == value else f'<span title="{value!r}">{shown}</span>'
    return escape(str(value))


def _verdict(stages: Sequence[Mapping[str, Any]]) -> str:
    gated = [stage for stage in stages if stage.get("passed") is not None]
    missed = [stage["name"] for stage in gated if not stage["passed"]]
    if not gated:
        return ""
    if missed:
        return f'<p class="verdict fail">{len(missed)} of {len(gated)} gates missed: {escape(", ".join(missed))}</p>'
    return f'<p class="verdict pass">{"All" if len(gated) > 1 else "The"} {len(gated)} gate{"s" * (len(gated) > 1)} passed</p>'


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    longest = max((stage.get("seconds") or 0.0 for stage in stages), default=0.0) or 1.0
    total = sum(stage.get("seconds") or 0.0 for stage in stages)
    rows = []
    for stage in stages:
        seconds = stage.get("seconds")
        bar = "" if seconds is None else f'<div class="bar"><i style="width:{100 * seconds / longest:.1f}%"></i></div>'
        scores = "".join(f"<li>{escape(name)} <b>{number(value)}</b></li>" for name, value in stage.get("scores", {}).items())
        note = f'<div class="quiet">{escape(stage["note"])}</div>' if stage.get("note") else ""
        cells = (
            f'<th scope="row">{escape(stage["name"])}{note}</th>',
            f'<td class="time">{bar}<span>{_duration(seconds)}</span></td>',
            f"<td>{_badge(stage)}</td>",
            f'<td class="gate">{escape(stage.get("gate") or "")}</td>',
            f'<td><ul class="scores">{scores}</ul></td>',
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "<tr><th>Stage</th><th>Time</th><th>Result</th><th>Gate</th><th>Scores</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div><p class="quiet">In all {_duration(total)}.</p>'


def _score_table(table: Mapping[str, Any]) -> str:
    rows, better = table["rows"], table.get("better", {})
    columns = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    best = {c: _best([row["scores"].get(c) for row in rows], better.get(c)) for c in columns}
    arrows = {"lower": " &darr;", "higher": " &uarr;"}
    head = "".join(f"<th>{escape(c)}{arrows.get(better.get(c), '')}</th>" for c in columns)
    lines, previous = [], None
    for row in rows:
        cells = []
        for column in columns:
            value = row["scores"].get(column)
            marked = ' class="best"' if best[column] is not None and value == best[column] else ""
            cells.append(f"<td{marked}>{number(value)}</td>")
        start = ' class="start"' if row["stage"] != previous else ""
        name = escape(row["stage"]) if row["stage"] != previous else ""
        previous = row["stage"]
        lines.append(f'<tr{start}><th scope="row">{name}</th><td>{number(row.get("steps"))}</td>{"".join(cells)}</tr>')
    title = f"<h3>{escape(table['title'])}</h3>" if table.get("title") else ""
    note = f'<p class="quiet">{escape(table["note"])}</p>' if table.get("note") else ""
    head = f"<tr><th>Stage</th><th>Steps</th>{head}</tr>"
    return f'{title}<div class="wide"><table class="numbers">{head}{"".join(lines)}</table></div>{note}'


def _best(values: list[Any], better: str | None) -> float | None:
    finite = [v for v in values if isinstance(v, int | float)]
    if better is None or len(finite) < 2:
        return None
    return min(finite) if better == "lower" else max(finite)


def _samples(videos: Sequence[Mapping[str, Any]], folder: Path) -> str:
    groups: dict[str, list[str]] = {}
    for video in videos:
        groups.setdefault(video.get("group", ""), []).append(_figure(video, folder))
    heads = {name: f"<h3>{escape(name)}</h3>" if name else "" for name in groups}
    return "".join(f'{heads[name]}<div class="tiles">{"".join(tiles)}</div>' for name, tiles in groups.items())


def _figure(video: Mapping[str, Any], folder: Path) -> str:
    path, poster = video["path"], video.get("poster")
    source = quote(path)
    words = escape(video.get("caption") or video.get("title") or path)
    if not (folder / path).is_file():
        media = f'<p class="missing">missing file: {escape(path)}</p>'
    elif PurePosixPath(path).suffix.lower() in _PICTURES:
        media = f'<img src="{source}" alt="{words}">'
    else:
        still = f' poster="{quote(poster)}"' if poster else ""
        inner = f'<img src="{quote(poster)}" alt="{words}">' if poster else f'<a href="{source}">{escape(path)}</a>'
        media = f'<video src="{source}"{still} autoplay loop muted playsinline aria-label="{words}">{inner}</video>'
    title = f"<b>{escape(video['title'])}</b> " if video.get("title") else ""
    return f"<figure>{media}<figcaption>{title}{escape(video.get('caption') or '')}</figcaption></figure>"


def _curves(stages: Sequence[Mapping[str, Any]]) -> str:
    found = []
    for stage in stages:
        history = stage.get("history") or {}
        for name, points in history.items() if isinstance(history, Mapping) else [("loss", history)]:
            if not points:
                continue
            label = f"{stage['name']}: {name}"
            last = f'<span class="quiet">last {number(points[-1][1])} at step {number(points[-1][0])}</span>'
            found.append(f"<figure><figcaption><b>{escape(label)}</b> {last}</figcaption>{line_chart(points, label=label)}</figure>")
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def _facts(machine: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{number(value)}</dd>" for name, value in machine.items())
    return f"<dl>{items}</dl>" if items else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _badge(stage: Mapping[str, Any]) -> str:
    passed = stage.get("passed")
    if passed is None:
        return f'<span class="quiet">{"not judged" if stage.get("gate") else "no gate"}</span>'
    return '<span class="pass">&#10003; passed</span>' if passed else '<span class="fail">&#10007; missed</span>'


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "&ndash;"
    if seconds < 60:
        return f'<span title="{seconds!r} s">{seconds:.1f} s</span>'
    minutes, rest = divmod(round(seconds), 60)
    return f'<span title="{seconds!r} s">{minutes} min {rest:02d} s</span>'


def _check(data: Mapping[str, Any]) -> None:
    _known(data, "", "report")
    for kind in ("stages", "tables", "videos"):
        for i, item in enumerate(data.get(kind, ())):
            _known(item, kind, f"{kind}[{i}]")
            for j, row in enumerate(item.get("rows", ())):
                _known(row, "rows", f"{kind}[{i}].rows[{j}]")
            for key in ("path", "poster"):
                place = PurePosixPath(item.get(key) or ".")
                if kind == "videos" and (place.is_absolute() or ".." in place.parts):
                    raise ConfigError(f"{kind}[{i}].{key}={str(place)!r} must be relative to the report's folder and inside it")
            for column, sense in item.get("better", {}).items():
                if sense not in ("lower", "higher"):
                    raise ConfigError(f"{kind}[{i}].better[{column!r}] is {sense!r}, expected 'lower' or 'higher'")


def _known(item: Mapping[str, Any], kind: str, where: str) -> None:
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {type(item).__name__}")
    unknown = sorted(set(item) - KEYS[kind])
    missing = [key for key in _REQUIRED.get(kind, ()) if key not in item]
    if unknown or missing:
        raise ConfigError(f"{where} has unknown keys {unknown} and lacks {missing}; known: {', '.join(sorted(KEYS[kind]))}")


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
    raise ConfigError(f"{where} is a {type(value).__name__}, expected numbers, text, lists and mappings (call float() on tensors)")
