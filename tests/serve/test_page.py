"""The page in a real browser: pictures move, a prompt gets its receipt, pause holds still, a
dropped socket comes back.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.serve.hub import Offer
from rcm.storage.shipped import toy_checkpoint
from tests.support import browser
from tests.support.live_server import PATIENCE, Live, live

pytestmark = pytest.mark.slow
PROMPTS = ("a red square moving left", "a green cross moving right")


class Relay:
    """A port before the server whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self._target, self._pairs = port, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Drop all connections; how many."""
        pairs, self._pairs = self._pairs, []
        for end in (end for pair in pairs for end in pair):
            _end(end)
        return len(pairs)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    _end(source)
    _end(sink)


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    with browser.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    model = open_checkpoint(toy_checkpoint())
    words = tuple(model.text.words)
    with live(Offer(model, PROMPTS[0], {"policy": SlidingWindow(9)}, fps=12, kind="png", presets=PROMPTS, words=words)) as running:
        yield running


@pytest.fixture
def page(chromium, server) -> Iterator:
    relay = Relay(server.port)
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.faults = []
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.relay = relay
    opened.goto(f"http://127.0.0.1:{relay.port}/")
    yield opened
    context.close()
    relay.listener.close()
    assert not opened.faults


def data(page, name: str):
    return page.evaluate(f"document.body.dataset.{name}")


def until(page, found) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end, page.inner_text("body")
        page.wait_for_timeout(50)


def screen(page) -> str:
    return page.evaluate("document.getElementById('screen').toDataURL()")


def newest(page) -> str:
    return page.locator("#receipts li").first.inner_text()


def test_the_page_from_a_first_look_to_a_dropped_socket(page):
    until(page, lambda: int(data(page, "frames")) > 3)
    assert page.inner_text("#status") == "live" and data(page, "state") == "live"
    seen = set()
    until(page, lambda: seen.add(screen(page)) or len(seen) >= 3)

    page.fill("#prompt", PROMPTS[1])
    page.press("#prompt", "Enter")
    until(page, lambda: "seen after" in newest(page))
    assert newest(page).startswith(PROMPTS[1]) and "applied at chunk" in newest(page)
    until(page, lambda: page.inner_text("#shown") == PROMPTS[1])

    page.click("#dice")
    until(page, lambda: data(page, "take") == "1" and "seen after" in newest(page))

    page.click("#play")
    until(page, lambda: page.get_attribute("#play", "aria-label") == "Play")
    page.wait_for_timeout(300)
    still, count = screen(page), data(page, "frames")
    page.wait_for_timeout(700)
    assert (screen(page), data(page, "frames")) == (still, count), "a paused stream holds still"
    page.click("#play")
    until(page, lambda: int(data(page, "frames")) > int(count))

    before = int(data(page, "frames"))
    assert page.relay.cut() >= 1
    until(page, lambda: data(page, "state") == "lost")
    assert "lost" in page.inner_text("#banner")
    until(page, lambda: data(page, "state") == "live" and int(data(page, "frames")) > before + 3)
    assert page.inner_text("#shown") == PROMPTS[1], "the same stream goes on"
    assert not page.is_visible("#banner")


def test_a_private_stream_is_found_again_after_a_reload_and_strange_words_are_told(page, server):
    until(page, lambda: data(page, "state") == "live")
    page.click("[data-stream=new]")
    until(page, lambda: page.get_attribute("[data-stream=new]", "aria-pressed") == "true" and data(page, "state") == "live")
    private = {name for name in server.hub.channels if name != "shared"}
    until(page, lambda: int(data(page, "frames")) > 3)
    page.reload()
    until(page, lambda: int(data(page, "frames")) > 3)
    assert {name for name in server.hub.channels if name != "shared"} == private and len(private) == 1
    page.fill("#prompt", "a purple square moving left")
    assert page.inner_text("#hint").startswith("New to this checkpoint: purple. It knows a, ")


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    until(page, lambda: data(page, "state") == "live")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
