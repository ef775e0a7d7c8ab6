"""A stream is stepped by one thread at a time: two would change one cache; and whatever modes of
torch its callers are in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rcm.core.errors import ConfigError


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
