"""The frame of a report's page and its style; `sections.py` fills `{{title}}` and `{{body}}`."""

from __future__ import annotations

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<style>
:root { --page: #f7f7f5; --card: #ffffff; --ink: #1b1d21; --quiet: #5f656d; --rule: #e0e2e5;
  --series: #2166c4; --screen: #0d0d0d;
  --good: #17703a; --bad: #b3261e; --good-tint: #e3f3e8; --bad-tint: #fbe7e5; --best: #e6effb;
    --wait-tint: #fff3d6;
  --s1: #2166c4; --s2: #c2571a; --s3: #17803d; --s4: #8a3fb8; --s5: #b3261e; --s6: #6b7280; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131518; --card: #1b1e22; --ink: #e8eaed; --quiet: #9ba2ab; --rule: #31363d;
    --series: #6aa9f7; --screen: #0d0d0d;
    --good: #6fce90; --bad: #ff8f86; --good-tint: #17301f; --bad-tint: #3a1d1b; --best: #1d3047;
      --wait-tint: #3a3117;
    --s1: #6aa9f7; --s2: #f0a06a; --s3: #6fce90; --s4: #cf9bf0; --s5: #ff8f86; --s6: #a3aab4; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 1240px; padding: 36px 28px 72px; background: var(--page);
  color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans",
  sans-serif; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 48px 0 6px; }
h3 { font-size: 15px; margin: 0 0 4px; }
h3.over { margin: 20px 0 8px; }
p { margin: 4px 0 12px; }
.lead { max-width: 70ch; font-size: 16px; color: var(--quiet); }
.quiet { color: var(--quiet); font-weight: 400; font-size: 13px; }
.verdict, .status { display: inline-block; margin: 8px 8px 0 0; padding: 6px 14px;
  border-radius: 8px; font-weight: 600; }
.status { background: var(--wait-tint); }
.verdict.pass { background: var(--good-tint); }
.verdict.fail { background: var(--bad-tint); white-space: normal; }
.pass { color: var(--good); white-space: nowrap; }
.fail { color: var(--bad); white-space: nowrap; }
figure { margin: 0; padding: 10px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 12px; min-width: 0; }
figcaption { margin-top: 7px; font-size: 13px; display: flex; flex-wrap: wrap; gap: 0 10px;
  font-variant-numeric: tabular-nums; }
figcaption span { color: var(--quiet); }
video, img { display: block; width: 100%; height: auto; border-radius: 7px;
  background: var(--screen); image-rendering: pixelated; }
.row { display: grid;
  grid-template-columns: minmax(130px, 200px) repeat(var(--columns), minmax(0, 230px)); gap: 14px;
  padding: 14px 0;
  border-top: 1px solid var(--rule); }
.stage { padding-top: 8px; }
.row h3 { overflow-wrap: anywhere; }
.open { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in;
  border-radius: 7px; }
.open:hover video { outline: 3px solid var(--series); }
.open:focus-visible, .close:focus-visible { outline: 3px solid var(--series); outline-offset: 2px; }
.large { width: min(96vw, 1200px); max-height: 94vh; overflow: auto; padding: 20px;
  color: var(--ink); background: var(--card);
  border: 1px solid var(--rule); border-radius: 14px; box-shadow: 0 20px 60px rgb(0 0 0 / 40%); }
.large::backdrop { background: rgb(0 0 0 / 60%); }
.large h3 { margin: 0 40px 12px 0; font-size: 18px; }
.large p { margin-top: 12px; font-size: 13px; color: var(--quiet); }
.close { position: absolute; top: 14px; right: 14px; width: 34px; height: 34px; font-size: 15px;
  cursor: pointer; color: var(--ink);
  background: var(--page); border: 1px solid var(--rule); border-radius: 50%; }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 14px; }
.strip figure { max-width: 640px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr));
  gap: 14px; }
.wide-charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.charts figure { max-width: 560px; }
.charts figure > figcaption { margin: 0 0 6px; }
.charts figure > p { margin: 6px 0 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 0;
  padding: 0; font-size: 13px; }
.legend li::before { content: ""; display: inline-block; width: 14px; height: 4px;
  margin-right: 6px; vertical-align: middle;
  border-radius: 2px; background: var(--colour); }
.s1 { --colour: var(--s1); } .s2 { --colour: var(--s2); } .s3 { --colour: var(--s3); }
.s4 { --colour: var(--s4); } .s5 { --colour: var(--s5); } .s6 { --colour: var(--s6); }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 12px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 8px 12px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
tr:last-child > * { border-bottom: 0; }
tr:first-child > th { color: var(--quiet); font-size: 13px; font-weight: 500; white-space: nowrap; }
tr + tr > th { font-weight: 600; }
.numbers td, .numbers tr:first-child th:nth-child(n + 2) { text-align: right;
  font-variant-numeric: tabular-nums; }
.numbers tr > * { border: 0; }
.numbers tr + tr > * { padding-top: 5px; padding-bottom: 5px; }
.numbers tr.start > * { border-top: 1px solid var(--rule); }
.numbers th { white-space: nowrap; }
.gate { min-width: 220px; }
.best { background: var(--best); font-weight: 700; }
.time { min-width: 190px; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; width: 100px; height: 10px; margin-right: 10px;
  vertical-align: middle; border-radius: 3px; }
.bar { background: var(--rule); }
.bar i { display: block; height: 100%; min-width: 2px; border-radius: 3px;
  background: var(--series); }
.scores { list-style: none; margin: 0; padding: 0; font-size: 13px;
  font-variant-numeric: tabular-nums; }
.missing { padding: 24px 12px; margin: 0; color: var(--bad); border: 1px dashed var(--bad);
  border-radius: 4px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font-size: 10.5px; }
svg text { fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg text.bad { fill: var(--bad); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg polyline { fill: none; stroke: var(--colour, var(--series)); stroke-linejoin: round; }
svg .line { stroke-width: 1.8; }
svg .raw { stroke-width: 1; opacity: 0.35; }
svg .dot { fill: var(--colour, var(--series)); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 20px; margin: 0;
  max-width: 92ch; }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 760px) {
  body { padding: 20px 14px 48px; }
  h1 { font-size: 24px; }
  .row { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .stage { grid-column: 1 / -1; padding: 0; }
  .stage p { margin-bottom: 0; }
  .none { display: none; }
  .large { padding: 14px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 10px; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
</style>
</head>
<body>
{{body}}
</body>
</html>
"""
