"""The thread that owns the pool and the device; the event loop asks it for work and never waits for
torch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from loguru import logger

from rcm.pipelines.session_pool import Seat, SessionPool, Turn, told_error

Result = TypeVar("Result")


class Worker(threading.Thread):
    """Turns of `pool` for seats that have credit, and calls in between; `deliver` is given every
    turn, in this thread.

    A seat has credit once `want(seat)` was called, for one chunk a call. `stop` closes all seats.
    """

    def __init__(self, pool: SessionPool, deliver: Callable[[Turn], None]) -> None:
        super().__init__(name="rcm-device", daemon=True)
        self.pool, self._deliver = pool, deliver
        self._wake = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._credit: dict[Seat, int] = {}
        self._stopping = False

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Run `work` between two turns; its result or error is in the future."""
        future: Future[Result] = Future()
        with self._wake:
            if self._stopping:
                future.set_exception(RuntimeError("the server is stopping"))
            else:
                self._calls.append((work, future))
                self._wake.notify()
        return future

    def want(self, seat: Seat) -> None:
        """Ask for one more chunk of a seat."""
        with self._wake:
            self._credit[seat] = self._credit.get(seat, 0) + 1
            self._wake.notify()

    def stop(self) -> None:
        """Finish the turn under way, close all seats, end. From any thread; `join` waits for it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        for seat in list(self.pool.seats):
            seat.session.cancel()

    @torch.no_grad()
    def run(self) -> None:
        """See `Thread`."""
        try:
            while not self._stopping:
                self._next()
        finally:
            with self._wake:
                self._stopping = True
                for _, future in self._calls:
                    future.cancel()
            self.pool.close_all()

    def _next(self) -> None:
        """All calls that wait, then one turn; or sleep until there is something to do."""
        while self._calls:
            work, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                _settle(work, future)
        turn = self.pool.turn(lambda seat: self._credit.get(seat, 0) > 0)
        if turn is not None:
            self._spend(turn)
            if not self._stopping:
                self._deliver(turn)
            return
        with self._wake:
            if not (
                self._stopping
                or self._calls
                or any(self._credit.get(seat) for seat in self.pool.seats)
            ):
                self._wake.wait()

    def _spend(self, turn: Turn) -> None:
        with self._wake:
            self._credit[turn.seat] -= 1
            self._credit = {
                seat: n for seat, n in self._credit.items() if n > 0 and not seat.closed
            }
        if turn.error is not None and not self._stopping:
            logger.error("a stream ended: {}", told_error(turn.error))


def _settle(work: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
