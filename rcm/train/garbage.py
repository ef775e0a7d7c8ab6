"""Keep Python's collector away from what lives as long as the run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_AT_START = gc.get_freeze_count()
"""Objects that the interpreter itself has frozen: 375 in Python 3.12."""


@contextmanager
def lasting_objects() -> Iterator[Callable[[], None]]:
    """Within the block the collector passes over every object that is there when it begins, or when
    the function that it yields is called.

    Left to itself it walks over all of them, a few hundred thousand, whenever enough new ones were
    made: for a tenth of a second and more, at another moment on each rank, while the others wait in
    their next collective. New cycles are found as before. What a caller froze before stays frozen,
    and with it what the block made: all or nothing can be unfrozen.
    """
    frozen_before = gc.get_freeze_count() > _AT_START

    def pass_over() -> None:
        gc.collect()
        gc.freeze()

    pass_over()
    try:
        yield pass_over
    finally:
        if not frozen_before:
            gc.unfreeze()
