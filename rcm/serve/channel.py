"""One stream on the server: a seat of the pool, its playback clock, and who watches. All of it
lives in the event loop.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rcm.core.errors import ConfigError
from rcm.pipelines.session_pool import Change, Order, Seat, Turn, told_error
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from rcm.serve.limits import Limits
from rcm.serve.metrics import Metrics, Samples
from rcm.serve.protocol import Format, Message, Picture, encode_image
from rcm.serve.viewer import Viewer

LATE = 0.01
"""Seconds by which a picture may miss its time before that counts as a stall."""


@dataclass(frozen=True)
class Playback:
    """How pictures leave: `fps` of the clock, image format and quality, and what encodes them (an
    executor).
    """

    fps: float
    kind: Format
    quality: int
    encoders: Any


@dataclass(frozen=True)
class Hands:
    """What a channel does to the device thread: `want` one more chunk of a seat, and run `soon` a
    callback in the event loop.
    """

    want: Callable[[Seat], None]
    soon: Callable[..., None]


class Channel:
    """A stream and its viewers. It plays while somebody watches and nobody has paused it.

    The clock shows one picture every 1/fps seconds, to all viewers alike; another chunk is asked
    for when no more pictures wait than the device needs time for. A picture that is late is a
    stall, and the clock goes on from it.
    """

    def __init__(
        self,
        name: str,
        seat: Seat,
        *,
        shared: bool,
        playback: Playback,
        limits: Limits,
        metrics: Metrics,
        hands: Hands,
    ) -> None:
        self.name, self.seat, self.shared = name, seat, shared
        self.viewers: set[Viewer] = set()
        self.ended = ""
        self.opened = self.watched = time.monotonic()
        self._playback, self._limits, self._metrics, self._hands = playback, limits, metrics, hands
        self.playing, self._prompt, self._trained = True, seat.prompts[0], seat.session.spec.recipe
        self._pictures: deque[Picture] = deque()
        self._arrivals: asyncio.Queue[Turn] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._asked_at: float | None = None
        self._coming = 0  # pictures that are being encoded
        self._delays: deque[float] = deque(maxlen=8)
        self._next_frame, self._take, self._number, self._stalls = 0, 0, 0, 0
        self._chunks = Samples()
        self._tasks = [asyncio.create_task(work()) for work in (self._play, self._encode)]

    def waiting(self) -> int:
        """Pictures that wait for the clock."""
        return len(self._pictures) + self._coming

    def join(self, viewer: Viewer) -> None:
        """Another one watches."""
        self.viewers.add(viewer)
        self._changed.set()

    def leave(self, viewer: Viewer) -> None:
        """One has gone; the last one to go stops the clock."""
        self.viewers.discard(viewer)
        self.watched = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What the stream is doing, for its viewers."""
        spec = self.seat.session.spec
        recipe, policy = spec.recipe, spec.policy
        steps = (
            [recipe.ode_steps] if recipe.kind == "ode" else [len(mids) + 1 for mids in recipe.mids]
        )
        return {
            "type": "state",
            "prompt": self._prompt,
            "playing": self.playing,
            "seed": spec.seed,
            "steps": steps,
            "context": "noisy" if recipe.noisy_context else "clean",
            "window": getattr(policy, "blocks", None),
            "take": self.seat.take,
            "viewers": len(self.viewers),
        }

    def stats(self) -> dict[str, Any]:
        """Timings of this stream, for its viewers. Milliseconds."""
        quantiles = {
            f"chunk_p{round(100 * q)}": round(1e3 * self._chunks.quantile(q), 2)
            for q in (0.5, 0.95, 0.99)
        }
        return {
            "type": "stats",
            **quantiles,
            "stalls": self._stalls,
            "waiting": self.waiting(),
            "viewers": len(self.viewers),
            "chunks": self.seat.turns,
            "bytes": self.seat.num_bytes(),
        }

    def ask(self, viewer: Viewer, message: Message) -> None:
        """Do what a client asks for; receipts go to it, the new state to everyone."""
        for what in message.changes:
            receipt = {"type": "receipt", "id": message.id, "what": what}
            viewer.tell({**receipt, "state": "received"})
            if what == "play":
                self.playing = bool(message.play)
                self._changed.set()
                viewer.tell(
                    {
                        **receipt,
                        "state": "applied",
                        "chunk": self.seat.turns,
                        "take": self.seat.take,
                    }
                )
                self.broadcast(self.state())
            else:
                kind, value = self._order(what, message)
                told = functools.partial(self._hands.soon, self._settled, viewer, receipt)
                self.seat.steer(Order(kind, value, mode=message.mode, part=what, told=told))

    def arrived(self, turn: Turn) -> None:
        """A turn of the seat is over."""
        if turn.error is not None:
            self._metrics.failed += 1
            self.end(f"the stream ended: {told_error(turn.error)}")
        elif turn.chunk is None:
            self.end("the stream has come to its end")
        else:
            self._metrics.chunks += 1
            self._metrics.chunk.add(turn.seconds)
            self._chunks.add(turn.seconds)
            # what was made before the new take is not worth waiting for
            if turn.take != self._take:
                self._take, self._next_frame = turn.take, 0
                self._pictures.clear()
            self._coming += turn.chunk.frames.shape[2]
            self._arrivals.put_nowait(turn)

    def broadcast(self, message: dict[str, Any]) -> None:
        """Tell all viewers."""
        for viewer in self.viewers:
            viewer.tell(message)

    def end(self, reason: str, *, code: int = 1011) -> None:
        """Tell all viewers why, and close them. The seat is not closed here."""
        self.ended = self.ended or reason
        for viewer in list(self.viewers):
            viewer.tell({"type": "bye", "reason": reason})
            viewer.close(code, reason)
        for task in self._tasks:
            task.cancel()

    def _order(self, what: str, message: Message) -> tuple[Change, Any]:
        if what == "prompt":
            return "prompt", [message.prompt]
        if what == "seed":
            return "seed", message.seed
        if what == "window":
            sinks = getattr(self.seat.session.spec.policy, "sinks", 0)
            return "policy", SlidingWindow(message.window or 1, sinks)
        if message.steps is not None and what == "steps":
            return "recipe", functools.partial(_stepped, trained=self._trained, steps=message.steps)
        return "recipe", functools.partial(replace, noisy_context=message.context == "noisy")

    def _settled(self, viewer: Viewer, receipt: dict[str, Any], order: Order) -> None:
        told = {**receipt, "state": order.state}
        if order.state == "applied":
            told |= {"chunk": order.applied_at, "take": order.take}
        if order.reason:
            told["reason"] = order.reason
        if order.what == "prompt" and order.state == "applied":
            self._prompt = order.value[0]
        viewer.tell(told)
        if order.state == "applied":
            self.broadcast(self.state())

    def _want(self) -> None:
        """Ask for a chunk, if there is not more waiting than lasts until it comes."""
        lead = max(
            self._limits.lead_frames,
            math.ceil(1.5 * self._playback.fps * max(self._delays, default=0.0)),
        )
        if self._asked_at is None and self.waiting() <= lead:
            self._asked_at = time.monotonic()
            self._hands.want(self.seat)

    async def _encode(self) -> None:
        """Chunks to pictures, in order, beside the event loop and the device thread."""
        loop = asyncio.get_running_loop()
        while True:
            turn = await self._arrivals.get()
            assert turn.chunk is not None  # others do not arrive
            if self._asked_at is not None:
                self._delays.append(time.monotonic() - self._asked_at)
            self._asked_at = None
            made = await loop.run_in_executor(
                self._playback.encoders, _encoded, turn, self._playback
            )
            self._coming -= len(made)
            if turn.take == self._take:
                for image in made:
                    self._pictures.append(
                        Picture(
                            turn.take,
                            turn.chunk.block,
                            self._next_frame,
                            image,
                            self._playback.kind,
                        )
                    )
                    self._next_frame += 1
                self._changed.set()

    async def _play(self) -> None:
        """The clock."""
        due, starved, step = None, False, 1 / self._playback.fps
        while True:
            self._changed.clear()
            if not (self.playing and self.viewers):
                due = None
                await self._changed.wait()
                continue
            self._want()
            if not self._pictures:
                starved = True
                await self._changed.wait()
                continue
            now = time.monotonic()
            if due is not None and due > now:
                await asyncio.sleep(due - now)
                continue
            late = 0.0 if due is None else now - due
            if starved and late > LATE:
                self._stalls, self._metrics.stalls = self._stalls + 1, self._metrics.stalls + 1
            starved = False
            self._show(self._pictures.popleft())
            due = now + step - (late if late < step else 0.0)

    def _show(self, picture: Picture) -> None:
        data = picture.message(self._number, time.monotonic() - self.opened)
        self._number += 1
        self._metrics.frames += 1
        self._metrics.shown.add()
        for viewer in self.viewers:
            viewer.offer(data)


def _stepped(
    recipe: SamplingRecipe, *, trained: SamplingRecipe, steps: tuple[int, ...]
) -> SamplingRecipe:
    """The recipe of a stream with other steps, out of the schedule that was trained."""
    if recipe.kind == "ode" and len(steps) > 1:
        raise ConfigError(
            f"steps={list(steps)} are for a few-step network; this one makes as many steps in every"
            " chunk: give one number"
        )
    if recipe.kind == "ode":
        return replace(recipe, ode_steps=steps[0])
    return replace(recipe, mids=trained.with_steps(*steps, knob="steps").mids)


def _encoded(turn: Turn, playback: Playback) -> list[bytes]:
    images = None if turn.chunk is None else turn.chunk.images
    assert images is not None, "sessions of the server are opened with to_host"
    assert images.dtype == torch.uint8
    return [
        encode_image(frame, playback.kind, quality=playback.quality) for frame in images[0].numpy()
    ]
