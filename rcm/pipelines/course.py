"""Whether a stream may go on: it is open, none of its chunks is missing, and the ranks that make it
together are with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rcm.core.errors import NonFinite, first_line
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
