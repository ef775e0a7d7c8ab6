"""The collector leaves alone what lasts, finds new cycles, and is as before afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from rcm.train import garbage
from rcm.train.garbage import lasting_objects


class Node:
    """A cycle with itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    """As in a process that does nothing but train; the suite freezes what it has collected."""
    gc.unfreeze()
    yield
    gc.freeze()


def scanned() -> int:
    return len(gc.get_objects())


def test_what_lasts_is_passed_over_and_new_cycles_are_found() -> None:
    before, frozen = scanned(), gc.get_freeze_count()
    with lasting_objects() as pass_over:
        assert scanned() < before / 10
        kept = [Node() for _ in range(1000)]
        assert scanned() >= 1000
        pass_over()
        assert scanned() < 1000
        lost = weakref.ref(Node())
        gc.collect()
        assert lost() is None
    assert gc.isenabled() and gc.get_freeze_count() == frozen and len(kept) == 1000
    dead = weakref.ref(kept.pop())
    gc.collect()
    assert dead() is None, "an object that was passed over could not be collected afterwards"


def test_what_the_interpreter_froze_is_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 begins with frozen objects; networks of an ended run would stay in memory."""
    gc.freeze()
    monkeypatch.setattr(garbage, "_AT_START", gc.get_freeze_count())
    with lasting_objects():
        lost = weakref.ref(Node())
    gc.collect()
    assert lost() is None and gc.get_freeze_count() == 0


def test_what_a_caller_froze_stays_frozen() -> None:
    with lasting_objects():
        outer, before = gc.get_freeze_count(), scanned()
        with lasting_objects():
            pass
        # frozen objects whose last reference goes are freed all the same
        assert gc.get_freeze_count() > 0.99 * outer and scanned() < before + 100
    assert gc.get_freeze_count() == 0
