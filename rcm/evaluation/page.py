"""The frame of a report's page: its style, for light and dark screens. `{{title}}` and `{{body}}` are filled by `report.py`."""

from __future__ import annotations

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<style>
:root { --page: #fbfbfa; --card: #ffffff; --ink: #1c1e21; --quiet: #63686f; --rule: #dfe1e4; --series: #1f6fd1;
  --good: #17703a; --bad: #b3261e; --good-tint: #e3f3e8; --bad-tint: #fbe7e5; --best: #e6effb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #1d2024; --ink: #e7e9ec; --quiet: #9aa1aa; --rule: #343a41; --series: #6aa9f7;
    --good: #6fce90; --bad: #ff8f86; --good-tint: #17301f; --bad-tint: #3a1d1b; --best: #1d3047; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 4px 0 12px; }
.quiet { color: var(--quiet); font-weight: 400; font-size: 13px; }
.verdict { display: inline-block; margin-top: 12px; padding: 6px 14px; border-radius: 8px; font-weight: 600; }
.verdict.pass { background: var(--good-tint); }
.verdict.fail { background: var(--bad-tint); }
.pass { color: var(--good); white-space: nowrap; }
.fail { color: var(--bad); white-space: nowrap; }
.verdict.fail { white-space: normal; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 8px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tr:last-child > * { border-bottom: 0; }
tr:first-child > th { color: var(--quiet); font-size: 13px; font-weight: 500; white-space: nowrap; }
tr + tr > th { font-weight: 600; }
.numbers td, .numbers tr:first-child th:nth-child(n + 2) { text-align: right; font-variant-numeric: tabular-nums; }
.numbers tr > * { border: 0; }
.numbers tr + tr > * { padding-top: 5px; padding-bottom: 5px; }
.numbers tr.start > * { border-top: 1px solid var(--rule); }
.numbers th { white-space: nowrap; }
.gate { min-width: 220px; }
.best { background: var(--best); font-weight: 700; }
.time { min-width: 190px; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; width: 100px; height: 10px; margin-right: 10px; vertical-align: middle; }
.bar { border-radius: 3px; background: var(--rule); }
.bar i { display: block; height: 100%; min-width: 2px; border-radius: 3px; background: var(--series); }
.scores { list-style: none; margin: 0; padding: 0; font-size: 13px; font-variant-numeric: tabular-nums; }
.tiles { display: flex; flex-wrap: wrap; gap: 14px; margin-bottom: 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 10px; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tiles figure { max-width: 100%; }
.tiles video, .tiles img { display: block; max-width: 100%; min-width: 128px; border-radius: 4px; image-rendering: pixelated; }
.tiles figcaption { margin-top: 6px; font-size: 13px; width: 0; min-width: 100%; }
.missing { padding: 24px 12px; margin: 0; color: var(--bad); border: 1px dashed var(--bad); border-radius: 4px; }
svg { display: block; width: 100%; height: auto; font-size: 10.5px; }
svg text { fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg text.bad { fill: var(--bad); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg polyline { fill: none; stroke: var(--series); stroke-linejoin: round; }
svg .line { stroke-width: 1.8; }
svg .raw { stroke-width: 1; opacity: 0.35; }
svg .dot { fill: var(--series); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; }
@media (max-width: 640px) { body { padding: 18px 14px 48px; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
</style>
</head>
<body>
{{body}}
</body>
</html>
"""
