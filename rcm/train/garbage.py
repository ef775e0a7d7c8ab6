"""Keep Python's collector away from what lives as long as the run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def lasting_objects() -> Iterator[Callable[[], None]]:
    """Within the block the collector passes over every object that is there when it begins, or when
    the function that it yields is called.

    Left to itself it walks over all of them, a few hundred thousand, whenever enough new ones were
    made: for a tenth of a second and more, at another moment on each rank, while the others wait in
    their next collective. New cycles are found as before.
    """

    def pass_over() -> None:
        gc.collect()
        gc.freeze()

    pass_over()
    try:
        yield pass_over
    finally:
        gc.unfreeze()
