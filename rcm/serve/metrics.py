"""Counters of a server, and the text in which monitors read them (Prometheus' exposition
format).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

KEPT = 1024


@dataclass
class Samples:
    """The last `KEPT` measurements, for quantiles."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, value: float) -> None:
        """One more."""
        self.values.append(value)

    def quantile(self, q: float) -> float:
        """The smallest value that a part `q` of all does not exceed; 0 without any."""
        found = sorted(self.values)
        return found[max(0, math.ceil(q * len(found)) - 1)] if found else 0.0


@dataclass
class Rate:
    """Events per second over the last seconds."""

    span: float = 5.0
    times: deque[float] = field(default_factory=lambda: deque(maxlen=4096))

    def add(self) -> None:
        """One event, now."""
        self.times.append(time.monotonic())

    def per_second(self) -> float:
        """Over the last `span` seconds."""
        since = time.monotonic() - self.span
        return sum(t >= since for t in self.times) / self.span


@dataclass
class Metrics:
    """What a server has done since it started. `chunk`: seconds that a chunk took on the device;
    `shown`: pictures that were due.
    """

    chunk: Samples = field(default_factory=Samples)
    shown: Rate = field(default_factory=Rate)
    chunks: int = 0
    frames: int = 0
    sent: int = 0
    dropped: int = 0
    stalls: int = 0
    refused: int = 0
    failed: int = 0
    closed_slow: int = 0

    def text(self, gauges: Iterable[tuple[str, str, float]]) -> str:
        """All counters, and `gauges` (name, meaning, value) of the moment."""
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, *values: tuple[str, float]) -> None:
            lines.extend(
                [
                    f"# HELP rcm_{name} {meaning}",
                    f"# TYPE rcm_{name} {kind}",
                    *(f"rcm_{name}{tag} {v:g}" for tag, v in values),
                ]
            )

        for name, meaning, value in gauges:
            add(name, "gauge", meaning, ("", value))
        add(
            "fps",
            "gauge",
            "pictures per second that were due, over all streams, in the last 5 s",
            ("", self.shown.per_second()),
        )
        quantiles = [(f'{{quantile="{q:g}"}}', self.chunk.quantile(q)) for q in (0.5, 0.95, 0.99)]
        add(
            "chunk_seconds",
            "summary",
            f"time of a chunk on the device, of the last {KEPT}",
            *quantiles,
        )
        for name, meaning in _COUNTERS.items():
            add(f"{name}_total", "counter", meaning, ("", getattr(self, name)))
        return "\n".join(lines) + "\n"


_COUNTERS = {
    "chunks": "chunks made",
    "frames": "pictures that were due",
    "sent": "pictures sent, over all clients",
    "dropped": "pictures dropped for slow clients",
    "stalls": "times that a picture was due and not there",
    "refused": "clients refused for a limit",
    "failed": "streams that ended with an error",
    "closed_slow": "clients closed because they took nothing",
}
