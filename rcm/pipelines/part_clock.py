"""Seconds and peak device memory of the named parts of a run; a part that runs inside another is
taken out of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PartClock:
    """Measures parts on one device, waiting for it at their borders.

    `seconds` by name, in order of first use. `peak_bytes` by name: most memory that tensors held
    during the part, what was there before included; empty where the device does not count (CPU).
    `interrupted`: the part in which the last exception began, None without one. `watch` is called
    with the innermost open part (None: no part) whenever that changes.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.interrupted: str | None = None
        self.watch: Callable[[str | None], None] = lambda name: None
        self._open: list[str] = []
        self._since = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    @property
    def peak(self) -> int | None:
        """Most bytes held in any part; None where the device does not count."""
        return max(self.peak_bytes.values(), default=None)

    def restart(self) -> None:
        """Forget everything measured so far; no part may be open."""
        self.seconds.clear()
        self.peak_bytes.clear()
        self.interrupted = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`; again for a name adds to it."""
        self._book()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)
        self.watch(name)
        try:
            yield
        except BaseException:
            self.interrupted = self.interrupted or name
            raise
        finally:
            self._book()
            self._open.pop()
            self.watch(self._open[-1] if self._open else None)

    def _book(self) -> None:
        """Give the time since the last border to the innermost open part."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] += now - self._since
            if cuda:
                self.peak_bytes[name] = max(
                    self.peak_bytes.get(name, 0), torch.cuda.max_memory_allocated(self.device)
                )
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since = now
