"""Kernel results that survive recomputation: recorded once, replayed in order, never twice, only
where asked for.
"""

from __future__ import annotations

import pytest
import torch

from rcm.kernels.replay import Tape, keeping, kept


def test_only_calls_without_a_tape_or_outside_keeping():
    calls, tape = [], Tape()

    def compute() -> tuple[torch.Tensor, ...]:
        calls.append(len(calls))
        return (torch.tensor(float(len(calls))),)

    with keeping():
        kept(compute)
    with tape.recording():
        kept(compute)
    with tape.replaying():
        kept(compute)
    assert calls == [0, 1, 2] and tape.num_results == 0


def test_replays_in_order_and_once():
    tape = Tape()
    with tape.recording(), keeping():
        first, second = (kept(lambda i=i: (torch.full((2,), i), torch.tensor(i))) for i in (1.0, 2.0))

    def refuse() -> tuple[torch.Tensor, ...]:
        raise AssertionError("the kernel ran again")

    with tape.replaying(), keeping():
        again = [kept(refuse), kept(refuse)]
        with pytest.raises(RuntimeError, match="asks for kernel result 2, its forward made 2"):
            kept(refuse)
    pairs = [pair for made, replayed in zip((first, second), again, strict=True) for pair in zip(made, replayed, strict=True)]
    assert all(torch.equal(a, b) and a.data_ptr() == b.data_ptr() for a, b in pairs)
    with tape.replaying(), keeping(), pytest.raises(RuntimeError, match="only one backward pass"):
        kept(refuse)
