"""A live server on a free port of this machine, in a thread, and what its clients need to read
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from rcm.serve.access import Access
from rcm.serve.hub import Hub, Offer
from rcm.serve.limits import Limits
from rcm.serve.protocol import HEADER
from rcm.serve.server import SEND_BUFFER, listen, serve

PATIENCE = 120.0
"""Seconds after which a test gives up waiting."""


@dataclass
class Live:
    """A server under test."""

    hub: Hub
    port: int
    thread: threading.Thread
    closed: list[int] = field(default_factory=list)

    def address(self, stream: str = "shared", **query: str) -> str:
        """Of a socket."""
        return f"ws://127.0.0.1:{self.port}/ws?" + "&".join(f"{k}={v}" for k, v in {"stream": stream, **query}.items())

    def client(self, stream: str = "shared", **options: Any) -> Client:
        """A client, connected inside a `with` block."""
        return Client(connect(self.address(stream), compression=None, max_size=None, max_queue=None, **options))

    def stop(self) -> int:
        """End the server; how many sessions it closed."""
        self.hub.request_stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.closed[0]


@dataclass
class Shown:
    """One picture as a client gets it."""

    take: int
    chunk: int
    frame: int
    number: int
    pixels: np.ndarray
    sent: float


@dataclass
class Client:
    """A socket whose messages and pictures are kept in order."""

    opening: Any
    socket: ClientConnection | None = None
    said: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Shown] = field(default_factory=list)
    close_code: int | None = None

    def step(self, timeout: float = PATIENCE) -> dict[str, Any] | Shown:
        """The next thing that comes; `ConnectionClosed` or `TimeoutError`."""
        got = self.socket.recv(timeout=timeout)
        if isinstance(got, str):
            self.said.append(json.loads(got))
            return self.said[-1]
        version, kind, take, chunk, frame, number, sent = HEADER.unpack_from(got)
        assert version == 1 and kind in (1, 2, 3)
        pixels = np.asarray(Image.open(io.BytesIO(got[HEADER.size :])).convert("RGB"))
        self.pictures.append(Shown(take, chunk, frame, number, pixels, sent))
        return self.pictures[-1]

    def until(self, found: Any, *, patience: float = PATIENCE) -> Any:
        """Read until `found(thing)`; that thing. Fails after `patience` seconds."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if found(thing := self.step(max(0.01, end - time.monotonic()))):
                return thing
        raise AssertionError(f"waited {patience} s in vain; it said {self.said[-5:]}")

    def frames(self, count: int) -> list[Shown]:
        """The next `count` pictures."""
        have = len(self.pictures)
        self.until(lambda _: len(self.pictures) >= have + count)
        return self.pictures[have : have + count]

    def message(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next message of a type with these fields."""
        return self.until(lambda m: isinstance(m, dict) and m["type"] == kind and all(m.get(k) == v for k, v in fields.items()))

    def ask(self, **message: Any) -> None:
        """Send a message."""
        self.socket.send(json.dumps(message))

    def to_end(self) -> None:
        """Read until the server closes."""
        try:
            self.until(lambda _: False)
        except ConnectionClosed as error:
            self.close_code = error.rcvd.code if error.rcvd else None

    def __enter__(self) -> Client:
        self.socket = self.opening.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.opening.__exit__(*error)


@contextlib.contextmanager
def live(
    offer: Offer, limits: Limits = Limits(), *, access: Access = Access(), budget: int | None = None, send_buffer: int = SEND_BUFFER
) -> Iterator[Live]:
    """A server that runs inside the block."""
    hub = Hub(offer, limits, budget)
    listener = listen("127.0.0.1", 0, send_s=limits.send_s, send_buffer=send_buffer)
    ready, closed = threading.Event(), []
    thread = threading.Thread(target=lambda: closed.append(asyncio.run(serve(hub, access, listener, ready=ready))), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    server = Live(hub, listener.getsockname()[1], thread, closed)
    try:
        yield server
    finally:
        if thread.is_alive():
            server.stop()
        listener.close()
