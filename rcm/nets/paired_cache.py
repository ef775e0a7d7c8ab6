"""The two caches of a guided model, one per branch, and what a pass of any model sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_view import CacheView, Observer


@dataclass(frozen=True)
class PairedView:
    """Views of both branches for one guided forward."""

    cond: CacheView
    negative: CacheView | None = None

    @property
    def branches(self) -> tuple[CacheView, ...]:
        return (self.cond,) if self.negative is None else (self.cond, self.negative)

    @property
    def prefix_tokens(self) -> int:
        """Visible cached tokens, as many in either branch."""
        return self.cond.prefix_tokens


class PairedCache:
    """`KVCache`s of both branches, moved in step; `negative` is None without guidance."""

    def __init__(self, cond: KVCache, negative: KVCache | None = None) -> None:
        self.cond, self.negative = cond, negative

    @property
    def num_tokens(self) -> int:
        return self.cond.num_tokens

    @property
    def num_chunks(self) -> int:
        return self.cond.num_chunks

    @property
    def branches(self) -> tuple[KVCache, ...]:
        return (self.cond,) if self.negative is None else (self.cond, self.negative)

    def append(
        self,
        visible: Sequence[int] | None = None,
        *,
        observers: Sequence[Observer | None] = (),
        as_id: int | None = None,
    ) -> PairedView:
        given = zip(self.branches, observers or (None,) * len(self.branches), strict=True)
        return PairedView(*(c.append(visible, observers=(o,), as_id=as_id) for c, o in given))

    def readonly(
        self,
        num_chunks: int | None = None,
        *,
        visible: Sequence[int] | None = None,
        transient: bool = False,
    ) -> PairedView:
        return PairedView(
            *(c.readonly(num_chunks, visible=visible, transient=transient) for c in self.branches)
        )

    def reset(self, free_buffers: bool = True) -> None:
        for branch in self.branches:
            branch.reset(free_buffers)


Cache = KVCache | PairedCache
View = CacheView | PairedView
Past = View | None
"""What a pass sees behind its own tokens: a view of a cache, or nothing."""
