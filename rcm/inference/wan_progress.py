"""What a Wan command shows while it works: the part it is in and for how long, a line or a bar per
step, the time that is left.
"""

from __future__ import annotations

import threading
import time
from typing import TextIO

from rcm.pipelines.experts import Step

BAR_WIDTH = 30
DOING = {
    "load": "loading a model",
    "text": "encoding the prompt",
    "image": "encoding the image",
    "network": "sampling",
    "decode": "decoding the video",
    "write": "writing the video",
}
"""Part of `PartClock` -> what it is called while it lasts; others are too short to be shown."""
TICK, TOLD_EVERY = 0.5, 30.0
"""Seconds between two looks; between two lines of one part where there is no terminal."""


class Progress:
    """Follows the parts of a run (`PartClock.watch`) and its steps (`OnStep`); a `with` block,
    which a thread watches meanwhile.

    On a terminal one line with the seconds of the part, and a bar with the time left per step;
    elsewhere a line when a part begins, every 30 seconds that it lasts, and per step.
    """

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self._spent: list[float] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._doing, self._since, self._told = "", 0.0, 0.0

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._clear()

    def part(self, name: str | None) -> None:
        """The innermost part that is open from now on; None for none."""
        doing = DOING.get(name or "", "")
        with self._lock:
            if doing == self._doing:
                return
            self._clear()
            self._doing, self._since = doing, time.monotonic()
            self._told = self._since
            if doing and doing != DOING["network"] and not self.out.isatty():
                self._write(f"{doing}\n")

    def step(self, step: Step, total: int) -> None:
        """A step is done."""
        told = f"step {step.index + 1}/{total}: t {step.t:.4f}, {step.expert}, {step.seconds:.3f} s"
        self._unit(told, done=step.index + 1, total=total, seconds=step.seconds)

    def chunk(self, done: int, total: int, *, seconds: float) -> None:
        """A chunk of a video is done."""
        told = f"chunk {done}/{total}: {seconds:.3f} s"
        self._unit(told, done=done, total=total, seconds=seconds)

    def _unit(self, told: str, *, done: int, total: int, seconds: float) -> None:
        with self._lock:
            self._spent = [*self._spent[: done - 1], seconds]
            if not self.out.isatty():
                self._write(f"{told}\n")
            else:
                filled = BAR_WIDTH * done // total
                left = spoken(sum(self._spent) / len(self._spent) * (total - done))
                end = "\x1b[K\n" if done == total else f", {left} left\x1b[K"
                self._write(f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {told}{end}")
            self._since = self._told = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            with self._lock:
                self._tick(time.monotonic())

    def _tick(self, now: float) -> None:
        if not self._doing:
            return
        if not self.out.isatty():
            if now - self._told >= TOLD_EVERY:
                self._told = now
                self._write(f"still {self._doing}, {spoken(now - self._since)}\n")
        elif self._doing != DOING["network"] or now - self._since > 2:
            self._write(f"\r{self._doing}, {spoken(now - self._since)}\x1b[K")

    def _clear(self) -> None:
        if self._doing and self.out.isatty():
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def spoken(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds > 90:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s"
