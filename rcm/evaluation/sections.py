"""The sections of a report's page: videos first, then measurements, then meanings."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from rcm.evaluation.charts import line_chart, lines_chart
from rcm.evaluation.page import PAGE

_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
}


def render(data: Mapping[str, Any], *, folder: Path, embedded_bytes: int) -> str:
    """The page. `folder` holds the videos; those of at most `embedded_bytes` become part of it."""
    stages, videos = data.get("stages", ()), data.get("videos", ())
    media = Media(folder, embedded_bytes)
    grid = [video for video in videos if not video.get("section")]
    drift = [video for video in videos if video.get("section")]
    charts, tables = [_chart(chart) for chart in data.get("charts", ())], data.get("tables", ())
    drawn = f'<div class="charts wide-charts">{"".join(charts)}</div>' if charts else ""
    below = "".join(_score_table(table) for table in tables if table.get("section"))
    scores = "".join(_score_table(table) for table in tables if not table.get("section"))
    hint = "Click one to see it large." if any(video.get("beside") for video in grid) else ""
    shown = _grid(grid, stages, media)
    stream = "".join(_figure(video, media) for video in drift)
    sections = [
        _section("Videos", shown, note=hint),
        _section("Measured", drawn + below),
        _section("The long stream", stream, wrap="strip"),
        _section("Loss curves", _curves(stages)),
        _section("All scores", scores),
        _section("Stages and gates", _stage_table(stages) if stages else ""),
        _section("Words", _facts(data.get("glossary", {}))),
        _section("Machine", _facts(data.get("machine", {}))),
    ]
    title = escape(data.get("title", "Report"))
    subtitle = f'<p class="lead">{escape(data["subtitle"])}</p>' if data.get("subtitle") else ""
    status = f'<p class="status">{escape(data["status"])}</p>' if data.get("status") else ""
    header = f"<header><h1>{title}</h1>{subtitle}{status}{_verdict(stages)}</header>"
    return PAGE.replace("{{title}}", title).replace("{{body}}", header + "".join(sections))


class Media:
    """Where the page finds a file: inside itself, or beside it."""

    def __init__(self, folder: Path, embedded_bytes: int) -> None:
        self._folder, self._limit, self._count = folder, embedded_bytes, 0

    def number(self) -> int:
        """A fresh number, for ids."""
        self._count += 1
        return self._count

    def exists(self, path: str) -> bool:
        """Whether the folder has the file."""
        return (self._folder / path).is_file()

    def source(self, path: str) -> str:
        """A data URI, or the quoted path of a large file."""
        file = self._folder / path
        kind = _TYPES.get(file.suffix.lower())
        if kind is None or not file.is_file() or file.stat().st_size > self._limit:
            return quote(path)
        return f"data:{kind};base64,{b64encode(file.read_bytes()).decode()}"

    def element(self, path: str, *, words: str) -> str:
        """The tag that shows a file; a sentence where it is missing."""
        if not self.exists(path):
            return f'<p class="missing">missing file: {escape(path)}</p>'
        if _TYPES.get(PurePosixPath(path).suffix.lower(), "").startswith("image/"):
            return f'<img src="{self.source(path)}" alt="{words}">'
        inner = f'<a href="{quote(path)}">{escape(path)}</a>'
        return (
            f'<video src="{self.source(path)}" autoplay loop muted playsinline'
            f' aria-label="{words}">{inner}</video>'
        )


def _quiet(text: str | None) -> str:
    return f'<p class="quiet">{escape(text)}</p>' if text else ""


def number(value: Any) -> str:
    """HTML of a value: 4 significant digits, the exact number as tooltip; None is a dash."""
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
        return (
            f'<p class="verdict fail">{len(missed)} of {len(gated)} gates missed:'
            f" {escape(', '.join(missed))}</p>"
        )
    return (
        f'<p class="verdict pass">{"All" if len(gated) > 1 else "The"} {len(gated)}'
        f" gate{'s' * (len(gated) > 1)} passed</p>"
    )


def _grid(
    videos: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], media: Media
) -> str:
    """A row per group, a column per title, in the order of first appearance."""
    columns = list(dict.fromkeys(video.get("title", "") for video in videos))
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for video in videos:
        rows.setdefault(video.get("group", ""), {})[video.get("title", "")] = video
    about = {stage["name"]: stage.get("about", "") for stage in stages}
    lines = []
    for group, cells in rows.items():
        head = f'<div class="stage"><h3>{escape(group)}</h3>{_quiet(about.get(group))}</div>'
        figures = "".join(
            _figure(cells[column], media) if column in cells else '<div class="none"></div>'
            for column in columns
        )
        lines.append(f'<div class="row" style="--columns:{len(columns)}">{head}{figures}</div>')
    return "".join(lines)


def _figure(video: Mapping[str, Any], media: Media) -> str:
    path, words = video["path"], escape(video.get("caption") or video.get("title") or video["path"])
    shown = media.element(path, words=words)
    title = f"<b>{escape(video['title'])}</b>" if video.get("title") else ""
    facts = "".join(f"<span>{escape(fact)}</span>" for fact in video.get("facts", ()))
    caption = f"<figcaption>{title}{facts}</figcaption>"
    beside = video.get("beside")
    if not beside or not media.exists(beside):
        return f"<figure>{shown}{caption}{_quiet(video.get('caption'))}</figure>"
    name = f"large{media.number()}"
    large = media.element(beside, words=words)
    text = f"<p>{words}</p>" if video.get("caption") else ""
    heading = f"<h3>{escape(video.get('group', ''))} {escape(video.get('title', ''))}</h3>"
    close = f'<button class="close" popovertarget="{name}" aria-label="close">&#10005;</button>'
    opened = f'<div popover id="{name}" class="large">{heading}{close}{large}{text}</div>'
    return (
        f'<figure><button class="open" popovertarget="{name}" aria-label="enlarge'
        f' {words}">{shown}</button>{caption}{opened}</figure>'
    )


def _chart(chart: Mapping[str, Any]) -> str:
    title, words = escape(chart.get("title", "")), _quiet(chart.get("note"))
    drawn = lines_chart(
        chart["lines"],
        label=chart.get("title", "chart"),
        x_label=chart.get("x", ""),
        y_label=chart.get("y", ""),
    )
    return f"<figure><figcaption><b>{title}</b></figcaption>{drawn}{words}</figure>"


def _curves(stages: Sequence[Mapping[str, Any]]) -> str:
    found = []
    for stage in stages:
        expected = _quiet(stage.get("expect"))
        for name, points in stage.get("history", {}).items():
            if not points:
                continue
            label = f"{stage['name']}: {name}"
            last = (
                f'<span class="quiet">last {number(points[-1][1])} at step'
                f" {number(points[-1][0])}</span>"
            )
            drawn = line_chart(points, label=label)
            found.append(
                f"<figure><figcaption><b>{escape(label)}</b>"
                f" {last}</figcaption>{drawn}{expected}</figure>"
            )
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    longest = max((stage.get("seconds") or 0.0 for stage in stages), default=0.0) or 1.0
    total = sum(stage.get("seconds") or 0.0 for stage in stages)
    rows = []
    for stage in stages:
        seconds = stage.get("seconds")
        share = 100 * (seconds or 0.0) / longest
        bar = f'<div class="bar"><i style="width:{share:.1f}%"></i></div>'
        bar = "" if seconds is None else bar
        scores = "".join(
            f"<li>{escape(name)} <b>{number(value)}</b></li>"
            for name, value in stage.get("scores", {}).items()
        )
        cells = (
            f'<th scope="row">{escape(stage["name"])}</th>',
            f'<td class="time">{bar}<span>{_duration(seconds)}</span></td>',
            f"<td>{_badge(stage)}</td>",
            f'<td class="gate">{escape(stage.get("gate") or "")}</td>',
            f'<td><ul class="scores">{scores}</ul></td>',
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    scored = "Scores" if any(stage.get("scores") for stage in stages) else ""
    head = f"<tr><th>Stage</th><th>Time</th><th>Result</th><th>Gate</th><th>{scored}</th></tr>"
    told = f'<p class="quiet">Work in all {_duration(total)}; stages may run side by side.</p>'
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>{told}'


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
        lines.append(
            f"<tr{start}><th"
            f' scope="row">{name}</th><td>{number(row.get("steps"))}</td>{"".join(cells)}</tr>'
        )
    title = f'<h3 class="over">{escape(table["title"])}</h3>' if table.get("title") else ""
    note = _quiet(table.get("note"))
    head = f"<tr><th>Stage</th><th>Steps</th>{head}</tr>"
    return (
        f'{title}<div class="wide"><table'
        f' class="numbers">{head}{"".join(lines)}</table></div>{note}'
    )


def _best(values: list[Any], better: str | None) -> float | None:
    finite = [v for v in values if isinstance(v, int | float)]
    if better is None or len(finite) < 2:
        return None
    return min(finite) if better == "lower" else max(finite)


def _facts(items: Mapping[str, Any]) -> str:
    listed = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{number(value)}</dd>" for name, value in items.items()
    )
    return f"<dl>{listed}</dl>" if listed else ""


def _section(title: str, body: str, *, note: str = "", wrap: str = "") -> str:
    if not body:
        return ""
    inner = f'<div class="{wrap}">{body}</div>' if wrap else body
    return f"<section><h2>{title}</h2>{_quiet(note)}{inner}</section>"


def _badge(stage: Mapping[str, Any]) -> str:
    passed = stage.get("passed")
    if passed is None:
        return f'<span class="quiet">{"not judged" if stage.get("gate") else "no gate"}</span>'
    if passed:
        return '<span class="pass">&#10003; passed</span>'
    return '<span class="fail">&#10007; missed</span>'


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "&ndash;"
    if seconds < 60:
        return f'<span title="{seconds!r} s">{seconds:.1f} s</span>'
    minutes, rest = divmod(round(seconds), 60)
    return f'<span title="{seconds!r} s">{minutes} min {rest:02d} s</span>'
