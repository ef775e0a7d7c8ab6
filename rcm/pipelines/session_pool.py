"""Several streams of one model on one device: they take turns, a chunk each, within a budget of
memory, and are steered while they run.

One thread owns the pool and the device; `Seat.steer` may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from loguru import logger

from rcm.core.errors import ConfigError, NonFinite, first_line
from rcm.core.records import require_kind
from rcm.nets.kv_fp8 import Fp8Store
from rcm.pipelines.from_checkpoint import LoadedModel
from rcm.pipelines.session import Session, SwitchRefused
from rcm.pipelines.stream_spec import Receipt, StreamedChunk
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.recipe import SamplingRecipe

MIB = 2**20
Change = Literal["policy", "seed", "recipe", "prompt"]
CHANGES: tuple[Change, ...] = ("policy", "seed", "recipe", "prompt")
"""What can be asked of a seat, in the order in which changes of one turn are applied: the first two
begin another take.
"""
ENDED = "the session ended first"
"""Why an order is refused that was not looked at."""


class PoolFull(ConfigError):
    """There is no seat, or no memory, for another session."""


@dataclass
class Order:
    """A change that was asked for, and what became of it. `part` of what is changed, "" for all of
    it: orders of other parts stand beside it. `applied_at` counts blocks of take `take`; `told` is
    called at every change of `state`, in the thread that made it; what it raises is logged.
    """

    what: Change
    value: Any
    mode: Literal["keep", "recache"] = "keep"
    part: str = ""
    told: Callable[[Order], None] | None = None
    state: Literal["received", "applied", "superseded", "refused"] = "received"
    applied_at: int | None = None
    take: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        require_kind("what", self.what, Change)

    def become(
        self,
        state: Literal["applied", "superseded", "refused"],
        *,
        at: int | None = None,
        take: int = 0,
        reason: str = "",
    ) -> None:
        """Settle the order."""
        self.state, self.applied_at, self.take, self.reason = state, at, take, reason
        try:
            if self.told is not None:
                self.told(self)
        except Exception as error:  # the stream goes on, and so do the other orders
            logger.error("what became of a {} could not be told: {}", self.what, first_line(error))


class Seat:
    """One session of a pool, with what is wanted of it. `take` counts its videos: a new seed or
    policy begins another.

    `predicted` bytes at a full window; `failed` is the error that ended it.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        prompts: list[str],
        options: dict[str, Any],
        *,
        predicted: int,
    ) -> None:
        self.name, self.session, self.prompts, self.options = name, session, prompts, options
        self.predicted = predicted
        self.standing = prompts  # under which the latest chunk was made; `prompts` may still wait
        self.take, self.turns = 0, 0
        self.failed: Exception | None = None
        self.closed = False
        self._orders: dict[tuple[Change, str], Order] = {}
        self._waiting: list[tuple[Order, Receipt]] = []
        self._lock = threading.Lock()

    def steer(self, order: Order) -> Order:
        """Ask for a change at the next chunk boundary; the latest of each kind and part wins. From
        any thread.
        """
        with self._lock:
            old, closed = self._orders.pop((order.what, order.part), None), self.closed
            if not closed:
                self._orders[order.what, order.part] = order
        if old is not None:
            old.become("superseded")
        if closed:
            order.become("refused", reason="the session is closed")
        return order

    def num_bytes(self) -> int:
        """What counts against the budget: measured, or predicted while the window fills."""
        return 0 if self.closed else max(self.predicted, self.session.num_bytes())

    def _taken(self) -> list[Order]:
        with self._lock:
            orders, self._orders = self._orders, {}
        return sorted(orders.values(), key=lambda order: CHANGES.index(order.what))

    def _report(self) -> None:
        """Settle the prompts that the session has taken up meanwhile."""
        still = []
        for order, receipt in self._waiting:
            if receipt.applied_at is not None:
                order.become("applied", at=receipt.applied_at, take=self.take)
                self.standing = list(order.value)
            elif receipt.superseded:
                order.become("superseded")
            elif receipt.refused:
                order.become("refused", reason=" ".join(receipt.refused.split()))
                self.prompts = self.standing
            else:
                still.append((order, receipt))
        self._waiting = still

    def _end(self) -> None:
        with self._lock:
            self.closed = True
        for order in [*self._taken(), *(order for order, _ in self._waiting)]:
            order.become("refused", reason=ENDED)
        self._waiting = []
        self.session.close()


@dataclass(frozen=True)
class Turn:
    """One turn: whose, the chunk (None: the video ended, or the seat failed), its take, and how
    long it took in seconds.
    """

    seat: Seat
    chunk: StreamedChunk | None
    take: int
    seconds: float
    error: Exception | None = None


@dataclass
class SessionPool:
    """Sessions of `model` that share its device. `memory_budget_bytes` bounds cache and decoder of
    all of them (None: no bound).
    """

    model: LoadedModel
    memory_budget_bytes: int | None = None
    max_sessions: int = 4
    seats: deque[Seat] = field(default_factory=deque)
    _opened: int = 0

    def __post_init__(self) -> None:
        require_kind("model", self.model, LoadedModel)
        require_kind("memory_budget_bytes", self.memory_budget_bytes, float | None)
        require_kind("max_sessions", self.max_sessions, int)

    def open(self, prompts: list[str], **options: Any) -> Seat:
        """A session in a seat of its own; options of `LoadedModel.open`. `PoolFull` beyond the
        limit or the budget, with the numbers.
        """
        if len(self.seats) >= self.max_sessions:
            raise PoolFull(
                f"session limit reached: {len(self.seats)} of {self.max_sessions} are open; try"
                " again when one has ended"
            )
        session, predicted = self._session(prompts, options, others=self.num_bytes())
        self._opened += 1
        seat = Seat(f"s{self._opened}", session, prompts, options, predicted=predicted)
        self.seats.append(seat)
        return seat

    def turn(self, ready: Callable[[Seat], bool] = lambda seat: True) -> Turn | None:
        """Give the next seat that is `ready` its turn: what was asked of it is applied, then it
        makes one chunk. None if no seat is.

        A seat that fails is closed and told in the turn; the others go on.
        """
        for seat in list(self.seats):
            if seat.closed or not ready(seat):
                continue
            self.seats.remove(seat)
            self.seats.append(seat)
            return self._step(seat)
        return None

    def close(self, seat: Seat) -> None:
        """Free a seat and its memory; nothing for one that is closed."""
        if seat in self.seats:
            self.seats.remove(seat)
            seat._end()

    def close_all(self) -> int:
        """Close every seat; how many there were."""
        count = len(self.seats)
        for seat in list(self.seats):
            self.close(seat)
        return count

    def num_bytes(self) -> int:
        """Bytes of all seats against the budget."""
        return sum(seat.num_bytes() for seat in self.seats)

    def _step(self, seat: Seat) -> Turn:
        begin, orders = time.perf_counter(), seat._taken()
        try:
            while orders:
                self._apply(seat, orders.pop(0))
            chunk = self._chunk(seat)
            seat._report()
        except Exception as error:  # whatever a session dies of, the others live on
            seat.failed = error
            self.close(seat)
            for order in orders:
                order.become("refused", reason=ENDED)
            return Turn(seat, None, seat.take, time.perf_counter() - begin, error)
        seat.turns += 1
        return Turn(seat, chunk, seat.take, time.perf_counter() - begin)

    @staticmethod
    def _chunk(seat: Seat) -> StreamedChunk | None:
        try:
            return seat.session.step()
        except SwitchRefused:  # its order is told by the receipt, and the stream goes on
            seat._report()
            return seat.session.step()

    def _apply(self, seat: Seat, order: Order) -> None:
        try:
            at = _ACTIONS[order.what](self, seat, order)
        except Exception as error:
            order.become("refused", reason=told_error(error))
            if isinstance(error, ConfigError):
                return
            raise
        if at is not None:
            order.become("applied", at=at, take=seat.take)

    def _set_policy(self, seat: Seat, order: Order) -> int:
        """Another window needs another cache: the session is opened anew, once it is known to
        fit.
        """
        policy: CachePolicy = order.value
        spec = seat.session.spec
        options = {**seat.options, "policy": policy, "seed": spec.seed, "recipe": spec.recipe}
        others = self.num_bytes() - seat.num_bytes()
        session, predicted = self._session(seat.prompts, options, others=others)
        seat.session.close()
        seat.session, seat.predicted, seat.options = session, predicted, options
        self._next_take(seat)
        return 0

    def _set_seed(self, seat: Seat, order: Order) -> int:
        cond = self.model.condition(seat.prompts)
        seat.session.restart(cond, seed=order.value, prefix=seat.options.get("prefix"))
        self._next_take(seat)
        return 0

    def _next_take(self, seat: Seat) -> None:
        seat.take += 1
        for order, _ in seat._waiting:  # its prompt is the one that the new take begins with
            order.become("applied", at=0, take=seat.take)
        seat._waiting, seat.standing = [], seat.prompts

    def _set_recipe(self, seat: Seat, order: Order) -> int:
        recipe: SamplingRecipe | Callable[[SamplingRecipe], SamplingRecipe] = order.value
        spec = seat.session.spec
        return seat.session.set_recipe(recipe(spec.recipe) if callable(recipe) else recipe)

    def _set_prompt(self, seat: Seat, order: Order) -> None:
        cond = self.model.condition(order.value)
        seat._waiting.append((order, seat.session.set_condition(cond, mode=order.mode)))
        seat.prompts = list(order.value)

    def _session(
        self, prompts: list[str], options: dict[str, Any], *, others: int
    ) -> tuple[Session, int]:
        """A session that fits beside `others` bytes, and its predicted bytes. Nothing large is
        allocated before its first step.
        """
        session = self.model.open(prompts, ignore_recipe=True, **options)
        needed, budget = predicted_bytes(self.model, session), self.memory_budget_bytes
        if budget is not None and others + needed > budget:
            session.close()
            raise PoolFull(
                f"a session of {needed / MIB:.1f} MiB does not fit: {others / MIB:.1f} of"
                f" {budget / MIB:.1f} MiB are taken; close another session, choose a smaller"
                " window, or raise the memory budget"
            )
        return session, needed


def predicted_bytes(model: LoadedModel, session: Session) -> int:
    """Bytes of cache and decoder of a session whose window is full; a coded cache is counted as if
    it were plain, its upper bound.
    """
    config, item = model.denoiser.net.config, model.denoiser.compute_dtype.itemsize
    batch = session.spec.batch
    caches = session.loop.cache.branches
    cache = (
        sum(2 * held.num_layers * held.capacity_tokens * config.dim * item for held in caches)
        * batch
    )
    stores = (held.store for held in caches)
    cache += sum(
        s.code_bytes(batch=batch, heads=config.num_heads, width=config.head_dim)
        for s in stores
        if isinstance(s, Fp8Store)
    )
    decoder = model.codec.stream()
    told = getattr(decoder, "bytes_for", None)
    return cache + (
        0 if told is None else told(batch=session.spec.batch, cells=session.spec.latent[1:])
    )


_ACTIONS: dict[str, Callable[[SessionPool, Seat, Order], int | None]] = {
    "policy": SessionPool._set_policy,
    "seed": SessionPool._set_seed,
    "recipe": SessionPool._set_recipe,
    "prompt": SessionPool._set_prompt,
}


def told_error(error: Exception) -> str:
    """The sentence that ends a failed session."""
    known = isinstance(error, ConfigError | NonFinite)
    return " ".join(str(error).split()) if known else first_line(error)
