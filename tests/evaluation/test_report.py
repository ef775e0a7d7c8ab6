"""The report: page and JSON hold the same numbers, text is escaped, nothing comes from outside; and
the throughput that goes into it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from base64 import b64decode
from html.parser import HTMLParser

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.evaluation.charts import MAX_POINTS, line_chart, lines_chart, log_ticks, running_mean, thinned, ticks
from rcm.evaluation.report import EMBEDDED_BYTES, write_report
from rcm.evaluation.throughput import measure
from rcm.pipelines.stream_spec import StreamedChunk

NASTY = "a <script>alert(\"x\")</script> & 'b'"
VOID = {"meta", "img"}
FILES = {"a b.mp4": b"grid", "small.mp4": b"small", "large.mp4": b"large", "long.mp4": b"x" * (EMBEDDED_BYTES + 1)}


def data(**changes) -> dict:
    stages = [
        {
            "name": f"teacher {NASTY}",
            "seconds": 131.25,
            "gate": f"FD < 0.5 {NASTY}",
            "passed": True,
            "history": {"loss": [[5 * i, 2.0 / (i + 1)] for i in range(50)]},
            "scores": {"FD": 0.2312345},
        },
        {
            "name": "TF-sCM",
            "seconds": 48.0625,
            "gate": "2-step FD within 2 x",
            "passed": False,
            "history": {"student": [[0, 1.0], [10, float("nan")], [20, 0.5]], "fake score": []},
        },
        {"name": "data"},
    ]
    rows = [{"stage": "TF-sCM", "steps": steps, "scores": {"FD": 0.1234567 * steps, "caption": 1 / steps, NASTY: 7}} for steps in (1, 2, 4)]
    rows.append({"stage": "SF-DMD", "steps": 4, "scores": {"FD": float("inf"), "caption": 0.5}})
    return {
        "title": f"Toy {NASTY}",
        "machine": {"cores": 2, "load": 0.123456789, "cpu": NASTY},
        "stages": stages,
        "tables": [{"title": NASTY, "note": NASTY, "better": {"FD": "lower", "caption": "higher"}, "rows": rows}],
        "videos": [
            {"title": NASTY, "caption": NASTY, "path": "videos/a b.mp4", "group": NASTY, "facts": [NASTY]},
            {"caption": "gone", "path": "videos/gone.mp4"},
            {"title": "1 step", "caption": NASTY, "path": "videos/small.mp4", "beside": "videos/large.mp4", "group": "TF-sCM"},
            {"title": "long", "path": "videos/long.mp4", "section": "drift"},
        ],
        "charts": [{"title": NASTY, "x": NASTY, "y": "score", "lines": [{"name": NASTY, "points": [[1, 2.0], [50, 4.0]], "colour": 3}]}],
        "glossary": {NASTY: NASTY},
        **changes,
    }


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "new" / "report"
    (folder / "videos").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / "videos" / name).write_bytes(content)
    page = write_report(folder, data())
    return page.read_text(), json.loads((folder / "report.json").read_text())


class Page(HTMLParser):
    """Tags with their attributes, and whether every one is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, text):
        self.words.append(text)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_holds_every_number_of_the_json(written):
    page, record = written
    numbers = [v for table in record["tables"] for row in table["rows"] for v in (row["steps"], *row["scores"].values())]
    numbers += [v for stage in record["stages"] for v in stage.get("scores", {}).values()]
    numbers += [v for v in record["machine"].values() if not isinstance(v, str)]
    assert len(numbers) == 18
    cells = set(re.findall(r'title="([^"]*)"', page)) | set(re.findall(r">([^<>]+)<", page))
    values = {float(cell) for cell in cells if re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?|inf", cell)}
    assert not [v for v in numbers if float(v) not in values]
    assert "131.25 s" in page
    assert "48.0625 s" in page


def test_json_is_what_was_given(written):
    _, record = written
    given = data()
    assert record["stages"][0] == given["stages"][0]
    assert record["tables"][0]["rows"][:3] == given["tables"][0]["rows"][:3]
    assert record["tables"][0]["rows"][3]["scores"]["FD"] == "inf"
    assert record["stages"][1]["history"]["student"][1] == [10, "nan"]


def test_text_is_escaped_and_tags_are_balanced(written):
    page, _ = written
    parsed = Page(page)
    assert parsed.open == []
    assert not parsed.all("script")
    assert "".join(parsed.words).count('<script>alert("x")</script>') >= 9
    assert [svg["aria-label"] for svg in parsed.all("svg")][:2] == [NASTY, f"teacher {NASTY}: loss"]


def test_nothing_comes_from_outside(written):
    page, _ = written
    parsed = Page(page)
    sources = [value for _, attrs in parsed.tags for name, value in attrs.items() if name in ("src", "href", "data", "srcset")]
    outside = {source for source in sources if not source.startswith("data:")}
    assert outside == {"videos/long.mp4", "videos/a%20b.mp4", "videos/small.mp4", "videos/large.mp4"}, "links for viewers without video"
    shown = [attrs["src"] for tag in ("video", "img") for attrs in parsed.all(tag)]
    assert [source for source in shown if not source.startswith("data:")] == ["videos/long.mp4"]
    assert not re.search(r"https?:|url\(|@import", page)
    assert not parsed.all("link")
    assert "prefers-color-scheme: dark" in page


def test_videos_play_and_missing_ones_are_said_to_be(written):
    page, _ = written
    videos = Page(page).all("video")
    held = [b64decode(video["src"].partition("base64,")[2]) for video in videos]
    assert held == [b"grid", b"small", b"large", b""]
    assert all({"autoplay", "loop", "muted"} <= set(video) for video in videos)
    assert "missing file: videos/gone.mp4" in page


def test_videos_come_first_in_a_grid_and_open_large_at_a_click(written):
    page, _ = written
    titles = ("Videos", "Measured", "The long stream", "Loss curves", "All scores", "Words", "Machine")
    order = [page.index(f"<h2>{title}") for title in titles]
    assert order == sorted(order)
    parsed = Page(page)
    opened = [attrs["id"] for attrs in parsed.all("div") if "popover" in attrs]
    buttons = [attrs["popovertarget"] for attrs in parsed.all("button")]
    assert buttons == [opened[0], opened[0]], "one button opens, one closes"
    rows = [attrs["style"] for attrs in parsed.all("div") if attrs.get("class") == "row"]
    assert rows == ["--columns:3"] * 3, "a row per group, a column per title"


def test_gates_and_best_values_are_marked(written):
    page, _ = written
    assert "1 of 2 gates missed: TF-sCM" in page
    assert (page.count("passed</span>"), page.count("missed</span>"), page.count(">no gate<")) == (1, 1, 1)
    assert re.findall(r'class="best">(?:<span title="([^"]*)">)?', page) == ["0.1234567", ""]


def test_all_gates_passed(tmp_path):
    page = write_report(tmp_path, {"stages": [{"name": "a", "passed": True}, {"name": "b", "passed": True}]}).read_text()
    assert "All 2 gates passed" in page
    assert write_report(tmp_path, {}).read_text().count("<section>") == 0


def test_what_json_does_not_know_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"report\.machine\.load is a Tensor"):
        write_report(tmp_path, data(machine={"load": torch.ones(1)}))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_report(tmp_path / "file" / "report", data())


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.5, 1.0])
    assert ticks(3.0, 3.0) == [3.0]
    assert ticks(-7.0, 23.0) == pytest.approx([0.0, 10.0, 20.0])
    assert log_ticks(0.02, 300.0) == pytest.approx([0.1, 1.0, 10.0, 100.0])
    assert log_ticks(0.3, 12.0) == pytest.approx([0.5, 1.0, 2.0, 5.0, 10.0])


def test_curves_stay_inside_the_picture_and_are_thinned():
    for values in ([3.0] * 5, [1e-6, 1.0, 1e6], [-1.0, 2.0], [5.0], list(range(5000))):
        svg = line_chart([[i, v] for i, v in enumerate(values)], label="loss")
        points = [tuple(map(float, p.split(","))) for found in re.findall(r'points="([^"]*)"', svg) for p in found.split()]
        assert all(52 <= x <= 330 and 10 <= y <= 164 for x, y in points)
        assert len(re.findall(r"[\d.]+,[\d.]+", svg)) <= 2 * MAX_POINTS
    svg = line_chart([[0, 1.0], [1, float("nan")], [2, 2.0]], label="loss")
    assert "1 not finite" in svg
    assert "no finite value" in line_chart([[0, float("inf")]], label="loss")
    assert thinned([(float(i), 1.0) for i in range(1000)], limit=10)[0] == (49.5, 1.0)
    assert running_mean([(0, 0.0), (1, 3.0), (2, 6.0), (3, 0.0)], width=3) == [(0, 0.0), (1, 3.0), (2, 3.0), (3, 0.0)]


def test_several_curves_share_a_frame_and_a_log_axis():
    svg = lines_chart(
        [
            {"name": "a", "points": [[1, 10.0], [2, 20.0], [4, 30.0]]},
            {"name": "b", "points": [[50, 40.0], [60, math.nan]]},
            {"name": "c", "points": []},
        ],
        label="score",
    )
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    steps = [b[0] - a[0] for a, b in itertools.pairwise(places)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2) and steps[2] == pytest.approx(steps[0] * math.log2(12.5), rel=0.01)
    assert all(52 <= x <= 330 and 10 <= y <= 164 for x, y in places)
    assert "1 not finite" in svg
    assert re.findall(r'<li class="(s\d)">(\w)', svg) == [("s1", "a"), ("s2", "b"), ("s3", "c")]
    assert "nothing measured yet" in lines_chart([{"name": "a", "points": [[1, float("nan")]]}], label="score")


def test_throughput_averages_timed_runs_only():
    totals = iter([100.0, 2.0, 4.0])
    started = []

    def start():
        total = next(totals)
        started.append(total)
        for block, seconds in enumerate((total / 2, total)):
            yield StreamedChunk(block, torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 3, 6, 2, 2), seconds)

    found = measure(start, warmup=1, num_runs=2)
    assert started == [100.0, 2.0, 4.0]
    assert (found.first_chunk, found.later_chunks, found.total, found.fps) == (1.5, 1.5, 3.0, 4.0)
    assert (found.num_frames, found.runs, found.peak_memory_gib) == (12, (2.0, 4.0), None)
