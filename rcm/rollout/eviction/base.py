"""A cache policy says what a chunk sees and what is kept; it never touches keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol, Self

from rcm.diffusion.blocks import BlockPattern
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_view import CachedChunk, Keys, Observer


class ChunkSpan(Protocol):
    """What a policy reads of a plan: its block and latent frames [start, stop) of the video."""

    @property
    def block(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class Placement:
    """What the passes of one chunk see and where they stand.

    visible       ids of the cached chunks that it attends to.
    frame_index   temporal position of each of its own frames.
    """

    visible: tuple[int, ...]
    frame_index: tuple[int, ...]


class CachePolicy:
    """A policy of one stream, asked in order; the base keeps everything at absolute positions.

    `branches` are the caches of the stream, one or (guided) two, which hold chunks with the same
    ids. A policy with state is made anew for every stream (`fresh`), and gives it to snapshots
    (`state`).
    """

    keys: Keys = "post_rope"
    any_keys = True
    """Whether keys may as well be stored the other way: true of policies that leave positions as
    they are.
    """
    absolute = True
    """Whether a new chunk stands at its frames' places in the video."""

    def capacity_frames(self, pattern: BlockPattern) -> int | None:
        """Most latent frames in a cache, the chunk in the making included; None: all."""
        return None

    def before(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> Placement:
        """What `chunk` sees. May drop chunks and set positions of those that stay."""
        return Placement(
            tuple(held.id for held in branches[0].chunks), tuple(range(chunk.start, chunk.stop))
        )

    def observers(self, branches: Sequence[KVCache]) -> tuple[Observer | None, ...]:
        """Per branch, who is shown queries and keys of the pass that enters a chunk."""
        return ()

    def after(self, branches: Sequence[KVCache], chunk: ChunkSpan) -> None:
        """`chunk` is in the cache now, as its newest entry."""

    def protected(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        """Ids of the sinks: what a change of prompt does not rewrite."""
        return ()

    def hidden(self, branches: Sequence[KVCache]) -> tuple[int, ...]:
        """Ids of cached chunks that a chunk does not see which is entered again, as the newest,
        after a change of prompt; it did not see them before.
        """
        return ()

    def forget(self, branches: Sequence[KVCache], chunks: Sequence[CachedChunk]) -> None:
        """The newest chunks, `chunks`, left the cache to be entered again under another condition,
        oldest first: forget their keys and queries. `observers` are shown the new passes.
        """

    def again(self, branches: Sequence[KVCache]) -> None:
        """The newest entry of the cache is one of those, entered again."""

    def fresh(self) -> Self:
        """The same policy for another stream, remembering nothing of this one."""
        return replace(self) if is_dataclass(self) else self

    def state(self) -> Any:
        """What the policy remembers, for a snapshot."""
        return None

    def load_state(self, state: Any) -> None:
        """Take up a `state`."""
