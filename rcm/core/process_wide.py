"""Settings of the whole process that a part of the work changes, in several threads at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack


class ProcessWide(AbstractContextManager[None]):
    """A scope in which a setting is changed by `change()`: by the first thread that enters, and put
    back by the last that leaves. Each on its own would put back what another one had set.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change, self._changed = change, ExitStack()
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._changed.enter_context(self._change())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._changed.close()
