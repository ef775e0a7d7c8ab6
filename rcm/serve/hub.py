"""All streams of a server: who may open one, who watches which, when one ends."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from rcm.pipelines.from_checkpoint import LoadedModel
from rcm.pipelines.session_pool import PoolFull, Seat, SessionPool, Turn
from rcm.serve.channel import Channel, Hands, Playback
from rcm.serve.limits import Limits
from rcm.serve.metrics import Metrics
from rcm.serve.protocol import Format
from rcm.serve.viewer import Viewer
from rcm.serve.worker import Worker

SHARED, NEW = "shared", "new"


class Refused(Exception):
    """A client that is not served: the sentence it is told, and the seconds after which it may try
    again (None: it need not).
    """

    def __init__(self, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Offer:
    """What the server streams: the model, how its sessions are opened (`LoadedModel.open`), and how
    pictures leave.
    """

    model: LoadedModel
    prompt: str
    options: dict[str, Any]
    fps: float
    kind: Format
    quality: int = 85
    presets: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


@dataclass
class Hub:
    """The state of a server, between `start` and `stop`. Lives in the event loop."""

    offer: Offer
    limits: Limits = Limits()
    memory_budget_bytes: int | None = None
    metrics: Metrics = field(default_factory=Metrics)
    channels: dict[str, Channel] = field(default_factory=dict)
    clients: int = 0
    stopping: bool = False
    request_stop: Callable[[], object] = lambda: None
    """Ends the server that runs this hub; from any thread."""

    async def start(self) -> None:
        """Start the device thread and the task that ends what is over."""
        self._loop = asyncio.get_running_loop()
        pool = SessionPool(self.offer.model, self.memory_budget_bytes, self.limits.sessions)
        self.worker = Worker(pool, lambda turn: self._soon(self._arrived, turn))
        self._encoders = ThreadPoolExecutor(2, "rcm-encode")
        self._opening = asyncio.Lock()
        self._by_seat: dict[Seat, Channel] = {}
        self.worker.start()
        self._reaper = asyncio.create_task(self._reap())

    async def stop(self, reason: str = "the server is stopping") -> int:
        """Tell all clients, close all sessions; how many there were. Once."""
        if self.stopping:
            return 0
        self.stopping, count = True, len(self.channels)
        self._reaper.cancel()
        for channel in self.channels.values():
            channel.end(reason, code=1001)
        self.channels.clear()
        self.worker.stop()
        await self._loop.run_in_executor(None, self.worker.join, 30)
        self._encoders.shutdown(wait=False)
        return count

    async def join(self, which: str, viewer: Viewer) -> Channel:
        """Let `viewer` watch the shared stream, a new one of its own, or one by its name. `Refused`
        with the reason.
        """
        if self.stopping:
            raise Refused("the server is stopping")
        if self.clients > self.limits.clients:
            raise Refused(
                f"client limit reached: {self.limits.clients} of {self.limits.clients}; try again"
                " later",
                retry_after=15,
            )
        channel = self.channels.get(which)
        if channel is None and which not in (SHARED, NEW):
            raise Refused(f"there is no stream {which[:40]!r}; it may have ended")
        if channel is None:
            async with self._opening:
                channel = self.channels.get(which) or await self._open(which)
        channel.join(viewer)
        return channel

    def hello(self, channel: Channel) -> dict[str, Any]:
        """What a client is told first."""
        model, options = self.offer.model, self.offer.options
        recipe = model.recipe
        assert recipe is not None
        height, width = model.pixel_size
        return {
            "type": "hello",
            "stream": channel.name,
            "shared": channel.shared,
            "fps": self.offer.fps,
            "width": width,
            "height": height,
            "format": self.offer.kind,
            "model": f"{model.source.name}, {model.description.stage}",
            "pattern": recipe.pattern,
            "kind": recipe.kind,
            "trained": {
                "steps": [len(mids) + 1 for mids in recipe.mids],
                "context": "noisy" if recipe.noisy_context else "clean",
            },
            "device": str(model.device),
            "graphs": options.get("graphs", "off"),
            "presets": list(self.offer.presets),
            "words": list(self.offer.words),
            "limits": {
                "prompt_chars": self.limits.prompt_chars,
                "steps": self.limits.steps,
                "window": self.limits.window,
            },
        }

    def metrics_text(self) -> str:
        """The counters, and the state of the moment."""
        seats = list(self.worker.pool.seats)
        channels = self.channels.values()
        viewers = [viewer for channel in channels for viewer in channel.viewers]
        budget = self.memory_budget_bytes
        gauges = [
            ("sessions", "open sessions", len(seats)),
            ("sessions_limit", "sessions that may be open", self.limits.sessions),
            ("clients", "connected clients", self.clients),
            (
                "device_queue_pictures",
                "pictures that wait for the clock, over all streams",
                sum(channel.waiting() for channel in channels),
            ),
            (
                "client_queue_max",
                "pictures that wait for the slowest client",
                max((v.waiting for v in viewers), default=0),
            ),
            ("client_queue_limit", "pictures that may wait for a client", self.limits.queue_frames),
            (
                "session_bytes",
                "cache and decoder of all sessions",
                sum(seat.num_bytes() for seat in seats),
            ),
            ("session_bytes_limit", "their budget, 0 for none", budget or 0),
        ]
        return self.metrics.text(gauges)

    async def _open(self, which: str) -> Channel:
        while True:
            try:
                seat = await asyncio.wrap_future(self.worker.call(self._seat))
                break
            except PoolFull as error:
                left = [channel for channel in self.channels.values() if not channel.viewers]
                if not left:
                    raise Refused(str(error), retry_after=10) from error
                oldest = min(left, key=lambda channel: channel.watched)
                oldest.end("nobody watched it")
                await asyncio.wrap_future(self._forget(oldest))
        offer = self.offer
        name = SHARED if which == SHARED else secrets.token_urlsafe(9)
        playback = Playback(offer.fps, offer.kind, offer.quality, self._encoders)
        hands = Hands(self.worker.want, self._soon)
        channel = Channel(
            name,
            seat,
            shared=which == SHARED,
            playback=playback,
            limits=self.limits,
            metrics=self.metrics,
            hands=hands,
        )
        self.channels[name] = self._by_seat[seat] = channel
        return channel

    def _soon(self, work: Any, *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work, *args)

    def _arrived(self, turn: Turn) -> None:
        channel = self._by_seat.get(turn.seat)
        if channel is not None:
            channel.arrived(turn)
            if channel.ended:
                self._forget(channel)

    def _seat(self) -> Seat:
        return self.worker.pool.open([self.offer.prompt], to_host=True, **self.offer.options)

    def _forget(self, channel: Channel) -> Future[None]:
        self.channels.pop(channel.name, None)
        self._by_seat.pop(channel.seat, None)
        return self.worker.call(lambda: self.worker.pool.close(channel.seat))

    async def _reap(self) -> None:
        """Once a second: timings to viewers, and an end to streams that are over."""
        while True:
            await asyncio.sleep(1)
            now, limits = time.monotonic(), self.limits
            for channel in list(self.channels.values()):
                for viewer in channel.viewers:
                    viewer.inform(channel.stats())
                if not channel.viewers and now - channel.watched > limits.idle_s:
                    channel.end("nobody watched it")
                elif not channel.shared and now - channel.opened > limits.session_s:
                    channel.end(
                        f"its time is up after {limits.session_s:g} s; open another", code=1000
                    )
                if channel.ended:
                    logger.info("closed stream {}: {}", channel.name[:4], channel.ended)
                    self._forget(channel)
