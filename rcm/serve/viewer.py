"""One client: what waits for it, and the task that sends it. Never more than a few pictures wait: a
slow reader sees fewer.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from rcm.serve.limits import Limits
from rcm.serve.metrics import Metrics

TEXTS = 64
"""Messages that wait for a client before it is closed: each answers one of its own, or tells a
change of the stream.
"""


class Viewer:
    """A client's end of a stream, fed by the event loop and emptied by `pump`."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._pictures: deque[bytes] = deque(maxlen=limits.queue_frames)
        self._texts: deque[dict[str, Any]] = deque()
        self._wake = asyncio.Event()
        self._timings: dict[str, Any] | None = None
        self._closing: tuple[int, str] | None = None
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return len(self._pictures)

    def offer(self, picture: bytes) -> None:
        """One more picture; the oldest one goes if there is no room."""
        if len(self._pictures) == self._pictures.maxlen:
            self.dropped += 1
            self._metrics.dropped += 1
        self._pictures.append(picture)
        self._wake.set()

    def tell(self, message: dict[str, Any]) -> None:
        """One more message, which is never dropped; a client that lets too many gather is
        closed.
        """
        if len(self._texts) >= TEXTS:
            self.close(1008, "too many messages are unread")
            return
        self._texts.append(message)
        self._wake.set()

    def inform(self, timings: dict[str, Any]) -> None:
        """Timings of the moment: the newest replace older ones, and wait until the client has
        caught up with the pictures.
        """
        self._timings = timings
        self._wake.set()

    def close(self, code: int, reason: str) -> None:
        """Close after the messages that wait."""
        self._closing = self._closing or (code, reason)
        self._wake.set()

    async def pump(self, socket: WebSocket) -> None:
        """Send until the client is gone, takes nothing for too long, or is closed."""
        try:
            while True:
                self._wake.clear()
                while self._texts:
                    await self._timed(_said(socket, self._texts.popleft()))
                if self._closing is not None:
                    code, reason = self._closing
                    await self._timed(
                        socket.close(code, reason.encode()[:120].decode(errors="ignore"))
                    )
                    return
                if self._timings is not None and len(self._pictures) <= 1:
                    timings, self._timings = self._timings, None
                    await self._timed(_said(socket, timings))
                elif self._pictures:
                    await self._timed(socket.send_bytes(self._pictures.popleft()))
                    self._metrics.sent += 1
                else:
                    await self._wake.wait()
        except TimeoutError:
            self._metrics.closed_slow += 1
        except (WebSocketDisconnect, RuntimeError, OSError):
            return  # the client has gone; whoever receives from it hears of it, too

    async def _timed(self, sending: Any) -> None:
        async with asyncio.timeout(self._limits.send_s):
            await sending


def _said(socket: WebSocket, message: dict[str, Any]) -> Any:
    """Send as ASCII, which holds whatever a client's JSON held, half a character, too."""
    return socket.send_text(json.dumps(message))
