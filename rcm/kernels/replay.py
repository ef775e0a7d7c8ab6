"""Results of kernels that activation recomputation takes from the first forward instead of running
the kernel again.

Selective checkpointing of torch sees operators; a Triton launch inside an autograd Function is
none. Such a Function passes its launch through `kept`. Without a tape, or outside `keeping`, that
only calls it; nothing here knows which kernel it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)
_keeping: ContextVar[bool] = ContextVar("keeping", default=False)


class Tape:
    """Results of one forward in the order of their making, to be taken once, in that order, by its
    recomputation.
    """

    def __init__(self) -> None:
        self._results: list[tuple[Tensor, ...] | None] = []
        self._next: int | None = None

    @property
    def num_results(self) -> int:
        """How many results were recorded."""
        return len(self._results)

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """The forward whose results are kept."""
        with self._as_current(None):
            yield self

    @contextmanager
    def replaying(self) -> Iterator[Tape]:
        """The recomputation of that forward."""
        with self._as_current(0):
            yield self

    @contextmanager
    def _as_current(self, position: int | None) -> Iterator[None]:
        self._next = position
        token = _tape.set(self)
        try:
            yield
        finally:
            _tape.reset(token)

    def pass_through(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Record what `compute` returns, or return what was recorded in its place. `RuntimeError`
        for a second backward pass, or a recomputation that asks for more than the forward made.
        """
        if self._next is None:
            made = compute()
            # aliases: the results themselves will carry the graph
            self._results.append(tuple(x.detach() for x in made))
            return made
        if self._next >= len(self._results):
            raise RuntimeError(
                f"the recomputation asks for kernel result {self._next}, its forward made"
                f" {len(self._results)}"
            )
        stored, self._results[self._next] = self._results[self._next], None
        if stored is None:
            raise RuntimeError(
                "a kept kernel result was already used: only one backward pass through recomputed"
                " blocks is possible"
            )
        self._next += 1
        return stored


@contextmanager
def keeping(on: bool = True) -> Iterator[None]:
    """Within, `kept` uses the current tape, or, not `on`, does not."""
    token = _keeping.set(on)
    try:
        yield
    finally:
        _keeping.reset(token)


def is_keeping() -> bool:
    """Whether results are being kept here."""
    return _keeping.get()


def kept(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`compute()`, or in a recomputation its result of the first forward; call it where no gradient
    is recorded (a Function's forward).
    """
    tape = _tape.get()
    return compute() if tape is None or not is_keeping() else tape.pass_through(compute)
