"""SIGTERM ends a command as Ctrl-C does: what is under way is cleared up, one word is said."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

INTERRUPTED, TERMINATED = 130, 143
"""Exit status after Ctrl-C and after SIGTERM, as shells have it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that `stop` ended."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def answer_while_importing(package: str) -> None:
    """Called by `package` as it is imported. Where `python -m` is about to run one of its modules:
    Ctrl-C while that imports what it needs, before its `main` can answer, is told in one word, too.
    """
    named = (word.split(".")[0] for word in sys.orig_argv)
    if sys.argv[:1] != ["-m"] or package not in named:  # "-m" until the module is found
        return
    others = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write("stopped\n")
        else:
            others(kind, error, trace)

    sys.excepthook = tell


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` in the block when SIGTERM comes, unless somebody else answers it: a run
    that saves first, a server. Nothing outside the main thread.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait
        raise Terminated

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
