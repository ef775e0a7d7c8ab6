"""uvicorn over the application, on a socket of our own, with an end that tells everyone."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from rcm.core.errors import ConfigError
from rcm.serve.access import Access
from rcm.serve.app import make_app
from rcm.serve.hub import Hub

SEND_BUFFER = 256 * 1024
"""Bytes that the kernel holds for a client. What waits there can no longer be dropped, so it is the
delay of a slow reader.
"""
MOST = 128
"""HTTP connections at once. A page takes a few, and each for a moment.
"""


class Unbuffered(WebSocketsSansIOProtocol):
    """A WebSocket whose sends wait until the kernel has taken everything: what lies in a buffer of
    ours could no longer be dropped.
    """

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)


class Brief(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # chosen at its import
    """An HTTP connection, of which `MOST` are open at once: a further one ends the oldest, so that
    silent ones do not use up the files that a process may open.
    """

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self.since = self.loop.time()
        # those that became WebSockets are others by now
        open_ones = (other for other in self.connections if not other.transport.is_closing())
        brief = [other for other in open_ones if isinstance(other, Brief)]
        if len(brief) > MOST:
            min(brief, key=lambda other: other.since).transport.abort()


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing to capture."""
        yield


def listen(host: str, port: int, *, send_s: float, send_buffer: int = SEND_BUFFER) -> socket.socket:
    """A listening socket whose connections hold little and are dropped when they take nothing;
    `ConfigError` where it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2e3 * send_s))
    try:
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or"
            " --host"
        ) from error
    return listener


async def serve(
    hub: Hub, access: Access, listener: socket.socket, *, ready: threading.Event | None = None
) -> int:
    """Serve until SIGINT, SIGTERM (in the main thread) or `Server.should_exit`; returns how many
    sessions were closed at the end.
    """
    config = uvicorn.Config(
        make_app(hub, access),
        backlog=100,  # are taken in one turn of the loop, before older ones can be ended
        http=Brief,
        ws=Unbuffered,
        ws_max_size=hub.limits.message_bytes,
        ws_per_message_deflate=False,  # pictures are compressed already
        ws_ping_interval=20,
        ws_ping_timeout=20,
        limit_concurrency=None,
        timeout_graceful_shutdown=3,
        access_log=False,
        log_config=None,  # its own asks for a standard output, which a daemon may not have
        log_level="critical",
        lifespan="off",
    )
    server = Server(config)
    server.config.load()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    hub.request_stop = lambda: loop.call_soon_threadsafe(stop.set)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
    await hub.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if ready is not None:
        ready.set()
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait((waiting, serving), return_when=asyncio.FIRST_COMPLETED)
    closed = await hub.stop()
    server.should_exit = True
    await serving
    waiting.cancel()
    return closed
