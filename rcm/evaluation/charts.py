"""Line charts as inline SVG in the page's colours, for pages that stand alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

MAX_POINTS = 400
"""Points drawn per curve; longer ones are averaged in equal runs of neighbours."""

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
_LOG_FROM = 30.0  # positive values that span more than this factor get a logarithmic axis
_SMOOTH_FROM = 30  # curves with more points also get a running mean

COLOURS = 6
"""Line colours that the page defines, `s1` .. `s6`."""

Point = tuple[float, float]


def line_chart(points: Sequence[Sequence[float]], *, label: str) -> str:
    """An `<svg>` of (x, y) pairs in order of x; long curves get a running mean over them. Values
    that are not finite are left out and counted. `label` is what a screen reader says.
    """
    pairs = [(float(x), float(y)) for x, y in points]
    curve = thinned([p for p in pairs if math.isfinite(p[1])])
    lost = sum(not math.isfinite(y) for _, y in pairs)
    if not curve:
        return f'<p class="quiet">{escape(label)}: no finite value in {len(pairs)} points</p>'
    ys = [y for _, y in curve]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > _LOG_FROM
    x_scale = _Scale(min(x for x, _ in curve), max(x for x, _ in curve), _LEFT, _WIDTH - _RIGHT)
    y_scale = _Scale(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, logarithmic=logarithmic)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += _axes(x_scale, y_scale)
    smooth = len(curve) > _SMOOTH_FROM
    parts.append(_path(curve, x_scale, y_scale, style="raw" if smooth else "line"))
    if smooth:
        parts.append(
            _path(
                running_mean(curve, width=max(3, len(curve) // 15)), x_scale, y_scale, style="line"
            )
        )
    return "".join(parts) + _lost(lost) + "</svg>"


def lines_chart(
    lines: Sequence[Mapping[str, Any]], *, label: str, x_label: str = "", y_label: str = ""
) -> str:
    """An `<svg>` of curves in one frame, points marked and named, with a legend below.

    `lines`: `name`, `points` [(x, y), ...], and `colour` 1 .. 6 (default: its place). An x axis of
    positive values over a factor of 8, such as steps, is logarithmic, ticked at the values. Values
    that are not finite are left out and counted.
    """
    curves = [
        [(float(x), float(y)) for x, y in line["points"] if math.isfinite(float(y))]
        for line in lines
    ]
    spots = [point for curve in curves for point in curve]
    if not spots:
        return f'<p class="quiet">{escape(label)}: nothing measured yet</p>'
    xs, ys = sorted({x for x, _ in spots}), [y for _, y in spots]
    base, room = _HEIGHT - _BOTTOM - 8, 0.08 * (max(ys) - min(ys)) or 1.0
    x_scale = _Scale(
        xs[0],
        xs[-1],
        _LEFT + 12,
        _WIDTH - _RIGHT - 12,
        logarithmic=xs[0] > 0 and xs[-1] / xs[0] > 8,
    )
    y_scale = _Scale(min(ys) - room, max(ys) + room, base, _TOP + 12)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += _axes(x_scale, y_scale, marked=xs if len(xs) <= 6 else None, base=base)
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    parts.append(f'<text x="2" y="{_TOP}">{escape(y_label)}</text>')
    legend = []
    for number, (line, curve) in enumerate(zip(lines, curves, strict=True), 1):
        colour, name = f"s{(line.get('colour', number) - 1) % COLOURS + 1}", escape(line["name"])
        places = [
            (
                f"{x_scale(x):.1f}",
                f"{y_scale(y):.1f}",
                f"<title>{name}: {_short(y)} at {_short(x)}</title>",
            )
            for x, y in curve
        ]
        if len(curve) > 1:
            parts.append(
                f'<polyline class="line {colour}"'
                f' points="{" ".join(f"{x},{y}" for x, y, _ in places)}"/>'
            )
        parts += [
            f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="3.4">{told}</circle>'
            for x, y, told in places
        ]
        legend.append(f'<li class="{colour}">{name}</li>')
    lost = _lost(sum(len(line["points"]) for line in lines) - len(spots))
    return "".join(parts) + f'{lost}</svg><ul class="legend">{"".join(legend)}</ul>'


def _lost(count: int) -> str:
    """What says that values were left out."""
    place = f'x="{_WIDTH - _RIGHT}" y="{_TOP + 10}" text-anchor="end"'
    return f'<text class="bad" {place}>{count} not finite</text>' if count else ""


def thinned(points: Sequence[Point], *, limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: means over equal runs of neighbours."""
    if len(points) <= limit:
        return list(points)
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    runs = [points[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def running_mean(points: Sequence[Point], *, width: int) -> list[Point]:
    """Mean of y over the `width` neighbours of each point, fewer of them near the ends."""
    half, out = width // 2, []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        window = points[i - reach : i + reach + 1]
        out.append((x, sum(y for _, y in window) / len(window)))
    return out


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high]; with 2 and 5 times them if they are fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(decades) >= 3:
        return decades[:: math.ceil(len(decades) / 6)]
    return [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]


class _Scale:
    """From values to picture coordinates; a single value sits in the middle."""

    def __init__(
        self, low: float, high: float, start: float, stop: float, *, logarithmic: bool = False
    ) -> None:
        self.low, self.high, self.logarithmic = low, high, logarithmic
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        low, high = self._map(self.low), self._map(self.high)
        share = 0.5 if high <= low else (self._map(value) - low) / (high - low)
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.logarithmic else ticks(self.low, self.high)

    def _map(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def _axes(
    x_scale: _Scale,
    y_scale: _Scale,
    *,
    marked: Sequence[float] | None = None,
    base: float = _HEIGHT - _BOTTOM,
) -> list[str]:
    parts = []
    for value in y_scale.ticks():
        y = y_scale(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
    )
    for value in x_scale.ticks() if marked is None else marked:
        x = x_scale(value)
        anchor = "end" if x > _WIDTH - _RIGHT - 8 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{base + 15}" text-anchor="{anchor}">{_short(value)}</text>'
        )
    return parts


def _path(points: Sequence[Point], x_scale: _Scale, y_scale: _Scale, *, style: str) -> str:
    spots = [(x_scale(x), y_scale(y)) for x, y in points]
    if len(spots) == 1:
        return f'<circle class="dot" cx="{spots[0][0]:.1f}" cy="{spots[0][1]:.1f}" r="3"/>'
    return f'<polyline class="{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>'


def _short(value: float) -> str:
    if 1 <= abs(value) < 1e5 and value == round(value):
        return f"{value:.0f}"
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
