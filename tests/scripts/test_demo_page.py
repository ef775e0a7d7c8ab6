"""The demo's page in a real browser: videos play, a click enlarges one, nothing sticks out of a
narrow window, both colour schemes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rcm.worlds.toy_world import ToyWorld
from scripts.demo_clips import keep_clips, keep_drift
from scripts.demo_page import write_page
from scripts.demo_progress import Board
from scripts.demo_record import Record
from scripts.demo_run import LONG_FRAMES, Demo
from scripts.demo_stages import WORLD, branches, flat
from tests.support import browser

pytestmark = pytest.mark.slow
FEW = ("4 steps", "2 steps", "1 step")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a demo whose every stage has the world's own videos as its samples."""
    folder, stages = tmp_path_factory.mktemp("demo"), flat(branches(quick=False))
    record = Record.open(folder, {"quick": False, "scale": 1.0, "videos": 48})
    demo = Demo(record, Board(branches(quick=False)), scale=1.0, num_videos=48, changed=lambda: None)
    scenes = demo.world.scenes(48, seed=3)
    videos, prompts = demo.world.render(scenes), demo.world.captions(scenes)
    longer = ToyWorld(WORLD).render(scenes).repeat(1, 1, 4, 1, 1)[:, :, :LONG_FRAMES]
    scores = demo.scorer.score(videos, prompts).as_dict()
    for stage in stages:
        entry = record.stage(stage.name)
        entry.update(trained=True, scored=True, train_seconds=60.0)
        for label in FEW if stage.kind in ("tf_dcm", "tf_scm", "sf_dmd") else ("many steps",):
            entry["plans"][label] = {"scores": scores, "speed": {"first_chunk": 0.1, "later_chunks": 0.02, "fps": 90.0}}
            keep_clips(folder, stage, label, videos, prompts)
        if stage.kind == "sf_dmd":
            keep_drift(folder, stage, longer, prompts)
            entry["drift"] = {f"adherence in window {i}": 99.0 - i for i in range(1, 5)} | {"drift over 4 windows": -3.0}
        metrics = demo.run(stage.name) / "metrics.jsonl"
        metrics.parent.mkdir(parents=True)
        metrics.write_text("".join(f'{{"step": {10 * i}, "loss/diffusion": {900 / i}}}\n' for i in range(1, 60)))
    return write_page(demo, stages, judged=True)


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    with browser.chromium() as opened:
        yield opened


def opened(chromium, file: Path, *, width: int = 1280, scheme: str = "light"):
    """The page alone in a fresh context, without a network, and the faults it reports."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("requestfailed", lambda request: page.faults.append(request.url[:80]))
    page.goto(file.as_uri())
    return page


def plays(page, video) -> bool:
    """Whether a video, once it is on the screen, moves on (muted ones pause while nobody sees
    them).
    """
    video.scroll_into_view_if_needed()
    held = video.element_handle()
    page.wait_for_function("v => v.readyState >= 2 && v.videoWidth > 0", arg=held)
    before = video.evaluate("v => v.currentTime")
    page.wait_for_function("([v, before]) => v.currentTime !== before", arg=[held, before])
    return True


def test_videos_play_and_a_click_enlarges_one(chromium, page_file: Path) -> None:
    page = opened(chromium, page_file)
    shown = page.locator(".row .open > video")
    assert (shown.count(), page.locator(".row figure > video").count()) == (3 + 6 * 3, 6), "stages in all steps; teachers beside students"
    box = page.locator(".row h3").first.bounding_box()
    assert box["y"] < 900, "the first row of videos is on the first screen"
    rows = page.locator(".row")
    assert all(plays(page, rows.nth(i).locator("video").first) for i in range(rows.count()))

    student = page.locator(".row", has=page.locator("h3", has_text="sf_dmd_c1-1")).locator(".open").last
    student.scroll_into_view_if_needed()
    small = student.locator("video").bounding_box()
    student.click()
    large = page.locator(".large:popover-open")
    assert large.count() == 1 and "sf_dmd_c1-1 1 step" in large.inner_text()
    assert "Above its teacher tf_c1-1 on the same noise" in large.inner_text()
    box = large.locator("video").bounding_box()
    assert box["width"] > 2 * small["width"] and box["x"] >= 0 and box["x"] + box["width"] <= 1280
    assert plays(page, large.locator("video"))
    page.keyboard.press("Escape")
    assert large.count() == 0
    student.click()
    large.locator(".close").click()
    assert large.count() == 0
    assert not page.faults
    page.context.close()


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(chromium, page_file: Path, width: int) -> None:
    page = opened(chromium, page_file, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".open").first.click()
    box = page.locator(".large:popover-open").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert not page.faults
    page.context.close()


def test_dark_and_light_screens_are_both_legible(chromium, page_file: Path) -> None:
    def contrast(page, selector: str) -> float:
        told = page.evaluate(
            """selector => { const own = document.querySelector(selector); let ground = own;
                const clear = node => getComputedStyle(node).backgroundColor === 'rgba(0, 0, 0, 0)';
                while (clear(ground)) ground = ground.parentElement;
                const style = getComputedStyle(own);
                return [own instanceof SVGElement ? style.fill : style.color, getComputedStyle(ground).backgroundColor]; }""",
            selector,
        )
        bright, dark = sorted((luminance(colour) for colour in told), reverse=True)
        return (bright + 0.05) / (dark + 0.05)

    grounds = {}
    for scheme in ("light", "dark"):
        page = opened(chromium, page_file, scheme=scheme)
        grounds[scheme] = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in ("h1", ".lead", "figcaption span", ".quiet", ".verdict", ".legend li", "td", "dd", "figure svg text", ".pass"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)
        page.context.close()
    assert grounds["dark"] < 0.05 < 0.8 < grounds["light"]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of a CSS `rgb(r, g, b)`."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
