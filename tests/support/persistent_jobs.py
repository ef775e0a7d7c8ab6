"""Who computes what in the persistent kernel, by plain loops."""

from __future__ import annotations

from collections.abc import Iterator

from rcm.kernels.persistent_attention.schedule import Plan


def jobs(plan: Plan, programs: int, program: int) -> Iterator[tuple[int, int, int, int]]:
    """(index, query tile, first and last key tile) of a program: whole query tiles first, then its
    share of what remains.
    """
    yield from ((index, index * programs + program, 0, plan.blocks) for index in range(plan.whole))
    shared = plan.remaining * plan.blocks
    at, stop = (min(p * shared // plan.sharers, shared) for p in (program, program + 1))
    index = plan.whole
    while at < stop:
        tile, low = divmod(at, plan.blocks)
        high = min(plan.blocks, low + stop - at)
        yield index, plan.whole * programs + tile, low, high
        at, index = at + high - low, index + 1
