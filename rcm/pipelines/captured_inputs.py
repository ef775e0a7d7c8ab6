"""What captured passes read from the device: latents, times, slots, rotary tables, the prompt, and
where codes of a quantised past are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcm.nets.condition import Condition
from rcm.nets.kv_coded import CodedStore, Group
from rcm.nets.kv_store import Piece
from rcm.nets.kv_view import CacheView
from rcm.nets.layout import TokenLayout
from rcm.nets.rope import RopePair, RopeTable
from rcm.nets.velocity_model import VelocityModel


class Kind(NamedTuple):
    """What tells captured passes over a coded cache apart: whether they append, tokens of the
    chunks in order, and what moved meanwhile.
    """

    appends: bool
    sizes: tuple[int, ...]
    generation: tuple[int, int]


class Codes(NamedTuple):
    """Codes that a pass reads, its own chunk included if it appends. `groups` is another object
    whenever their places are others.
    """

    kind: Kind
    groups: Sequence[Group]


Kinds = tuple[Kind, ...]


def codes_of(branch: CacheView) -> Codes | None:
    """The codes of a pass; None where the cache is plain. An append is given memory for its own."""
    store, own = branch.store, branch.own_chunk
    if not isinstance(store, CodedStore):
        return None
    if own is not None:
        store.reserve(own.id, own.num_tokens)
    pieces = tuple(
        Piece(0, c.num_tokens, c.id, 0) for c in (*branch.visible, *([] if own is None else [own]))
    )
    sizes = tuple(piece.stop for piece in pieces)
    return Codes(Kind(own is not None, sizes, store.generation), store.groups(pieces))


class CapturedInputs:
    """Device memory that the graphs of one chunk size read: latents, noise, times, slots, tables,
    the prompt.
    """

    def __init__(self, x: Tensor, cond: Condition, layout: TokenLayout, *, fused: bool) -> None:
        self.fused = fused
        self.x, self.noise = torch.zeros_like(x), torch.zeros_like(x)
        self.t, self.t_next = (
            torch.zeros(x.shape[0], 1, dtype=torch.float64, device=x.device) for _ in range(2)
        )
        self.slots = torch.zeros(layout.num_tokens, dtype=torch.int64, device=x.device)
        self.cond = cond.copies()
        self._prompt: Condition | None = cond
        self.times: tuple[Tensor, ...] | None = None
        self._placed: tuple[Any, ...] | None = None
        self._found: list[Sequence[Group] | None] = []
        self.query: RopeTable | None = None
        self.keys: dict[int, list[RopeTable]] = {}
        self.kinds: Kinds | None = None
        self.groups: dict[tuple[int, Kinds], list[Group]] = {}

    def set(
        self,
        x: Tensor,
        noise: Tensor | None,
        *,
        t: float,
        t_next: float,
        rows: tuple[Tensor, ...] | None,
    ) -> None:
        """Latents and times of a step, and what the network makes of the first."""
        self.x.copy_(x)
        if self.times is None and rows is not None:
            self.times = type(rows)(*(known.clone() for known in rows))
        for mine, known in zip(self.times or (), rows or (), strict=True):
            mine.copy_(known)
        if noise is not None:
            self.noise.copy_(noise)
        self.t.fill_(t)
        self.t_next.fill_(t_next)

    def prompt(self, cond: Condition) -> None:
        """Take up a condition, if it is another object than the one at hand."""
        if cond is self._prompt:
            return
        _copy_tensors(self.cond, cond)
        self._prompt = cond

    def place(
        self,
        branches: Sequence[CacheView],
        codes: Sequence[Codes | None],
        layout: TokenLayout,
        denoiser: VelocityModel,
    ) -> None:
        """Slots, rotary tables and codes of a chunk; nothing if they are those of the pass
        before.
        """
        kinds = tuple(found.kind for found in codes if found is not None)
        self.kinds = kinds or None
        spans = (
            branches[0].own_spans
            if not kinds
            else ((layout.context_tokens, layout.context_tokens + layout.num_tokens),)
        )
        turned = tuple(b.keys == "pre_rope" and b.positions(layout).frames for b in branches)
        placed = (spans, layout.frame_index, turned, kinds)
        groups = [found and found.groups for found in codes]
        # chunks may have the ids of others that were dropped: a restart, a snapshot taken up again,
        # a recache
        if placed == self._placed and all(
            mine is new for mine, new in zip(self._found, groups, strict=True)
        ):
            return
        self._placed, self._found, at = placed, groups, 0
        for start, stop in spans:
            torch.arange(start, stop, out=self.slots[at : at + stop - start])
            at += stop - start
        rope, dtype = denoiser.rope, torch.promote_types(denoiser.compute_dtype, torch.float32)
        device = self.x.device
        found = rope.table(layout.frame_index, layout.grid, device=device, dtype=dtype)
        self.query = _static(self.query, found)
        for i, branch in enumerate(branches):
            if branch.keys == "pre_rope":
                known = self.keys.setdefault(layout.context_tokens, [])
                table = rope.at(branch.positions(layout), device=device, dtype=dtype)
                known[i : i + 1] = [_static(known[i] if i < len(known) else None, table)]
        for i, coded in enumerate(codes):
            if coded is not None:
                held = self.groups.setdefault((i, kinds), [])
                held[:] = [_same_place(*pair) for pair in zip_longest(held, coded.groups)]

    def tables(self, branch: int, context_tokens: int) -> RopePair:
        """Rotary tables of one branch over a past of so many tokens."""
        keys = self.keys.get(context_tokens)
        assert self.query is not None  # placed
        return RopePair(self.query, self.query if not keys else keys[branch])


def _static(mine: RopeTable | None, table: RopeTable) -> RopeTable:
    """`table` in memory that graphs may read: made at the first call, overwritten later."""
    if mine is None:
        mine = RopeTable(table.cos.clone(), table.sin.clone())
        mine.__dict__["per_pair"] = tuple(x.clone() for x in table.per_pair)
        return mine
    mine.cos.copy_(table.cos)
    mine.sin.copy_(table.sin)
    for x, y in zip(mine.per_pair, table.per_pair, strict=True):
        x.copy_(y)
    return mine


def _same_place(mine: Group | None, group: Group) -> Group:
    """`group` in memory that graphs may read: made at the first call, overwritten later."""
    if mine is None:
        return group._replace(addresses=group.addresses.clone(), starts=group.starts.clone())
    mine.addresses.copy_(group.addresses)
    return mine


def _copy_tensors(target: Condition, source: Condition) -> None:
    """Overwrite every tensor of `target` with that of `source`. `ValueError` for conditions of
    another make.
    """
    mine, theirs = target.tensors(), source.tensors()
    if [x.shape for x in mine] != [x.shape for x in theirs]:
        raise ValueError(
            "a stream's conditions must have the same shapes and preparation; prepare() the new one"
            " like the first"
        )
    for x, y in zip(mine, theirs, strict=True):
        x.copy_(y)
