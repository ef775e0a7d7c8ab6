"""Where the ranks that make one stream together meet: before every chunk, and when one of them
leaves. What one rank finds or wants alone would leave the others waiting in a pass; here all hear.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from rcm.core.errors import NonFinite, PeerGone
from rcm.parallel.agree import agree, greatest
from rcm.pipelines.stream_spec import StreamCancelled, SwitchRefused

_REFUSED, _STOPPED, _NOT_FINITE = 1, 2, 3


class Meeting:
    """The ranks of `group`, None for a stream of one rank, which meets nobody. Every rank calls
    `meet` before each chunk or `leave` once: a reduction of five numbers in host memory.

    `stopped`: no chunk is made any more. `adrift`: this rank was thrown out of a pass, in which
    others may wait for it: it cannot meet them, and they hear of it when its process ends.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.stopped = self.adrift = False

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self._group is not None

    def together(self, action: Callable[[], None]) -> None:
        """Do `action` on every rank; a failure of any is raised on all."""
        problem = None
        try:
            action()
        except Exception as error:
            if self._group is None:
                raise
            problem = error
        if self._group is not None:
            agree(problem, group=self._group)

    def meet(self, problem: Exception | None, *, place: int, asked: bool) -> None:
        """Before the chunk `place`. Raises on all ranks `SwitchRefused` where one refuses a change
        of condition, or where it was `asked` on some of them alone; `NonFinite` where one made
        something that is not; `StreamCancelled` where one has another `problem` or is at another
        place.
        """
        if self._group is None:
            if problem is not None:
                raise problem
            return
        worst, last, first, some, not_all = self._told(_kind(problem), place, asked)
        self.adrift = False
        kind, behind = divmod(worst, self._group.size())
        who = f"rank {dist.get_global_rank(self._group, self._group.size() - 1 - behind)}"
        self.stopped = kind >= _STOPPED or last != -first
        if kind == _NOT_FINITE:
            raise problem or NonFinite(
                f"{who} found that this stream is not finite, and says where; look at its output"
            )
        if kind == _STOPPED:
            raise problem or StreamCancelled(
                f"{who} left this stream, which it makes together with others: it was cancelled,"
                " closed, or failed there; open another session"
            )
        if self.stopped:
            raise StreamCancelled(
                f"the ranks of this stream are at different chunks ({-first} and {last}); step, "
                "restart and restore it on all of them alike, and open another session"
            )
        if kind == _REFUSED:
            raise problem or SwitchRefused(f"{who} refused the change of condition, and says why")
        if some and not_all == 0:
            raise SwitchRefused(
                "the change of condition was asked on some ranks of this stream alone; call"
                " set_condition on all of them"
            )

    def leave(self, *, not_finite: bool = False) -> None:
        """This rank makes no further chunk: the others hear of it, and whether it is for a
        `NonFinite`, where they would begin the next.
        """
        if self._group is not None and not self.stopped and not self.adrift:
            self.stopped = True
            with suppress(PeerGone):
                self._told(_NOT_FINITE if not_finite else _STOPPED, 0, False)

    def _told(self, kind: int, place: int, asked: bool) -> list[int]:
        assert self._group is not None
        # the greatest of them is of the worst kind, and among those of the first rank
        mine = kind * self._group.size() + self._group.size() - 1 - self._group.rank()
        numbers = (mine, place, -place, int(asked), -int(asked))
        return greatest(numbers, group=self._group)


def _kind(problem: BaseException | None) -> int:
    if isinstance(problem, NonFinite):
        return _NOT_FINITE
    stopped = 0 if problem is None else _STOPPED
    return _REFUSED if isinstance(problem, SwitchRefused) else stopped
