"""The ASGI application: the page, its socket, health and metrics."""

from __future__ import annotations

import asyncio
import time
from importlib import resources

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from rcm.core.errors import first_line
from rcm.serve.access import Access
from rcm.serve.channel import Channel
from rcm.serve.hub import SHARED, Hub, Refused
from rcm.serve.limits import Bucket
from rcm.serve.protocol import ProtocolError, read_message
from rcm.serve.viewer import Viewer

SAFE = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob:"
        " data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(hub: Hub, access: Access) -> Starlette:
    """Routes over `hub`, which whoever serves the application starts and stops."""

    def guarded(answer: Response, request: Request) -> Response:
        refused = _refusal(access, request)
        return answer if refused is None else PlainTextResponse(refused + "\n", 403, headers=SAFE)

    async def page(request: Request) -> Response:
        text = resources.files("rcm.serve").joinpath("page.html").read_text(encoding="utf-8")
        return guarded(HTMLResponse(text, headers=SAFE), request)

    async def health(request: Request) -> Response:
        alive = hub.worker.is_alive() and not hub.stopping
        return JSONResponse(
            {"status": "ok" if alive else "stopping", "sessions": len(hub.channels)},
            200 if alive else 503,
        )

    async def metrics(request: Request) -> Response:
        return guarded(
            PlainTextResponse(hub.metrics_text(), media_type="text/plain; version=0.0.4"), request
        )

    async def socket(socket: WebSocket) -> None:
        refused = _refusal(access, socket)
        if refused is not None:
            await socket.send_denial_response(PlainTextResponse(refused + "\n", 403))
            return
        await socket.accept()
        hub.clients += 1
        try:
            await _serve(hub, socket)
        finally:
            hub.clients -= 1

    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/metrics", metrics),
            WebSocketRoute("/ws", socket),
        ]
    )


def _refusal(access: Access, connection: HTTPConnection) -> str | None:
    return access.refusal(connection.headers, connection.query_params)


async def _serve(hub: Hub, socket: WebSocket) -> None:
    """One client, from its first to its last message."""
    viewer = Viewer(hub.limits, hub.metrics)
    channel: Channel | None = None
    try:
        channel = await hub.join(socket.query_params.get("stream", SHARED), viewer)
        viewer.tell(hub.hello(channel))
        viewer.tell(channel.state())
    except Refused as error:
        hub.metrics.refused += 1
        viewer.tell({"type": "refused", "reason": str(error), "retry_after": error.retry_after})
        viewer.close(1013, str(error))
    except Exception as error:  # the device thread could not open a session
        hub.metrics.failed += 1
        viewer.tell(
            {
                "type": "refused",
                "reason": f"the stream could not be opened: {first_line(error)}",
                "retry_after": None,
            }
        )
        viewer.close(1011, "the stream could not be opened")
    pump = asyncio.create_task(viewer.pump(socket))
    listen = asyncio.create_task(_listen(hub, socket, viewer, channel))
    try:
        await asyncio.wait((pump, listen), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (pump, listen):
            task.cancel()
        if channel is not None:
            channel.leave(viewer)
        await asyncio.gather(pump, listen, return_exceptions=True)


async def _listen(hub: Hub, socket: WebSocket, viewer: Viewer, channel: Channel | None) -> None:
    bucket, strikes = Bucket(hub.limits.rate, hub.limits.burst), 0
    while (event := await socket.receive())["type"] != "websocket.disconnect":
        if channel is None:
            continue
        if not bucket.take(time.monotonic()):
            strikes += 1
            if strikes >= hub.limits.strikes:
                viewer.close(1008, "too many messages")
            elif strikes == 1 or strikes % 20 == 0:
                viewer.tell(
                    {
                        "type": "error",
                        "reason": (
                            f"too many messages: {hub.limits.rate:g} a second are read, this one"
                            " was not"
                        ),
                    }
                )
            continue
        try:
            message = read_message(event.get("text") or event.get("bytes") or "", hub.limits)
        except ProtocolError as error:
            viewer.tell({"type": "error", "id": error.message_id, "reason": str(error)})
            continue
        if message.ping is not None:
            viewer.tell({"type": "pong", "ping": message.ping})
        channel.ask(viewer, message)
