"""Whether a stream may go on: it is open, none of its chunks is missing, the ranks that make it
together are with it, one thread steps it (two would change one cache), and no other stream takes
its draws (a video's noise is drawn in an order).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from rcm.core.errors import ConfigError, NonFinite, first_line
from rcm.pipelines.stream_ranks import Meeting
from rcm.pipelines.stream_spec import StreamCancelled, SwitchRefused


class Course:
    """Of one session. `cancelled`: by its user, from any thread. `failed`: the first line of what
    left it between two states, and whether that was a `NonFinite`, until another video is begun or
    a snapshot taken up. Not the error: its traceback holds every tensor of the pass that it ended.
    """

    def __init__(self, ranks: Meeting) -> None:
        self.ranks, self.cancelled = ranks, False
        self.failed: tuple[str, bool] | None = None

    def fail(self, error: BaseException) -> None:
        """`error` left it between two states."""
        self.failed = first_line(error), isinstance(error, NonFinite)

    @contextmanager
    def marking(self, *, in_pass: bool = True) -> Iterator[None]:
        """An error within, Ctrl-C too, leaves the stream between two states: remembered, so that no
        later chunk is made of half a past. `in_pass`: other ranks may wait in it for this one.
        """
        try:
            yield
        except SwitchRefused:  # before anything is changed
            raise
        except BaseException as error:
            self.ranks.adrift |= in_pass
            self.fail(error)
            raise

    def require_open(self) -> None:
        """`StreamCancelled` for a stream that makes no chunk any more."""
        if self.cancelled or self.ranks.stopped:
            raise StreamCancelled("this stream was cancelled or closed; open another session")

    def require_whole(self, *, last: bool) -> None:
        """The same for one that failed; `last`: no further chunk is to come."""
        if self.cancelled or self.failed is not None:
            self.leave(last=last)
        self.require_open()
        if self.failed is not None:
            raise StreamCancelled(
                f"this stream failed ({self.failed[0]}); restart() it, or restore() a snapshot"
            )

    def leave(self, *, last: bool) -> None:
        """Tell the ranks that make another chunk with this one that it will not."""
        if not last:
            self.ranks.leave(not_finite=self.failed is not None and self.failed[1])

    def meet(self, problem: Exception | None, *, place: int, asked: bool) -> None:
        """See `Meeting.meet`; a cancelled stream ends there."""
        stop = StreamCancelled("this stream was cancelled") if self.cancelled else problem
        self.ranks.meet(stop, place=place, asked=asked)


@contextmanager
def no_gradients() -> Iterator[None]:
    """Without gradients, and outside of a caller's inference mode: what is allocated in that could
    not be written to out of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def one_thread(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of a session with `no_gradients`, refused while another thread is in one: they would
    change the same cache.
    """

    @functools.wraps(method)
    def alone(self: Any, *arguments: Any, **options: Any) -> Any:
        if not self._user.acquire(blocking=False):
            self._course.require_open()  # what closes it waits for nobody else
            raise ConfigError(
                f"{method.__name__}() was called while another thread uses this stream; step a"
                " stream from one thread (cancel, close and set_condition may be called from any)"
            )
        try:
            with no_gradients():
                return method(self, *arguments, **options)
        finally:
            self._user.release()

    return alone


class Drawing(Protocol):
    """A session, as far as its draws are concerned. It holds its generator."""

    @property
    def may_draw(self) -> bool:
        """Whether it may still ask its generator for numbers."""
        ...


_held: weakref.WeakValueDictionary[int, Drawing] = weakref.WeakValueDictionary()
"""By the generator's `id`, which is its own while the session lives: generators of torch 2.11 take
no weak references.
"""


def lease(generator: torch.Generator | None, session: Drawing) -> None:
    """Let `session` draw from `generator`, if it has one. `ConfigError` while another session
    may.
    """
    if generator is None:
        return
    other = _held.get(id(generator))
    if other is not None and other is not session and other.may_draw:
        raise ConfigError(
            "generator= draws for another session that is still open, and each would change the"
            " other's noise; give every session a torch.Generator of its own, or close() the other"
            " one first"
        )
    _held[id(generator)] = session
