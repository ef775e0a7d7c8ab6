"""Keys and values as blobs of a codec: cold chunks are codes alone, restored layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcm.core.device_copy import to_device
from rcm.kernels.kv_codec.segments import Part, attend_parts
from rcm.kernels.masks import MaskSpec
from rcm.nets.kv_codec import SIDES, AddressedCodec, CorrectingCodec, KVCodec
from rcm.nets.kv_store import Pair, Piece, Seen, Spans, form_of, require_form, runs

Blobs = tuple[Any, Any]
"""Blobs of the keys and of the values of one chunk and layer."""


class Group(NamedTuple):
    """Chunks of equal form, as one launch restores them: forms of keys and values; addresses int64
    [layers, 2, P, fields] and first tokens int64 [P], on the device.
    """

    like: Blobs
    addresses: Tensor
    starts: Tensor

    def restore(
        self,
        codec: AddressedCodec,
        layer: int,
        out: Pair,
        *,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write the keys (turned by `turn`) and values of a layer into `out`, [B, L, N, D] each."""
        for at, (x, side) in enumerate(zip(out, SIDES, strict=True)):
            codec.restore(
                self.like[at],
                self.addresses[layer, at],
                self.starts,
                x,
                side=side,
                turn=turn if side == "key" else None,
            )


class CodedStore:
    """Blobs per layer, chunk and side; the newest `hot_chunks` stay plain until they age.

    What a forward reads is restored into one scratch buffer that all layers share, so cold chunks
    exist as codes only. `generation` changes with the place of anything but blobs that a captured
    pass touches. It `attends` where the bias of coded keys is to be taken off.
    """

    in_place = False

    def __init__(
        self, num_layers: int, capacity: int, codec: KVCodec, *, hot_chunks: int = 0
    ) -> None:
        self.capacity, self.codec, self.hot_chunks = capacity, codec, hot_chunks
        self.attends = isinstance(codec, CorrectingCodec) and codec.corrects_bias
        self._blobs: list[dict[int, Blobs]] = [{} for _ in range(num_layers)]
        self._hot: list[dict[int, Pair]] = [{} for _ in range(num_layers)]
        self._forms: dict[int, Blobs] = {}
        self._groups: tuple[tuple[Piece, ...], list[Group]] | None = None
        self._entering: int | None = None
        self._addresses: dict[int, Tensor] = {}
        self._scratch: Pair | None = None
        self._scratches = 0

    @property
    def generation(self) -> tuple[int, int]:
        return self._scratches, (
            self.codec.generation if isinstance(self.codec, AddressedCodec) else 0
        )

    def attend(
        self, layer: int, q: Tensor, pair: Pair, seen: Seen, *, mask: MaskSpec | None
    ) -> Tensor:
        """See `Store`: of coded chunks what their keys gained by rounding is taken off."""
        codec, scale = self.codec, q.shape[3] ** -0.5
        assert isinstance(codec, CorrectingCodec)
        parts, at = [], 0
        for chunk, tokens in seen.chunks:
            coded = self._blobs[layer].get(chunk)
            gain = coded and codec.key_gain(q, coded[0], scale=scale, rotated=seen.rotated)
            parts.append(Part(at, at + tokens, gain))
            at += tokens
        parts.append(Part(at, pair[0].shape[1]))
        return attend_parts(q, *pair, parts, scale=scale, mask=mask)

    @property
    def addressed(self) -> AddressedCodec:
        """The codec, which must be read by address."""
        assert isinstance(self.codec, AddressedCodec)
        return self.codec

    @property
    def scratch(self) -> Pair:
        """What the layers share, [B, capacity, N, D] each; `RuntimeError` before the first read."""
        if self._scratch is None:
            raise RuntimeError("the scratch buffer is allocated by the first read")
        return self._scratch

    def put(self, layer: int, chunk: int, spans: Spans, pair: Pair, *, hot: bool = True) -> None:
        """See `Store`: as codes, or plain while it is among the newest."""
        self._forget_place_of(chunk)
        self._entering = chunk if hot else self._entering
        if hot and self.hot_chunks:
            self._hot[layer][chunk] = (pair[0].clone(), pair[1].clone())
        else:
            self._blobs[layer][chunk] = self._encode(layer, pair)

    def commit(self, chunk: int) -> None:
        """See `Store`: code what is no longer among the newest."""
        self._entering = None
        for layer, hot in enumerate(self._hot):
            for old in sorted(hot)[: max(0, len(hot) - self.hot_chunks)]:
                self._blobs[layer][old] = self._encode(layer, hot.pop(old))

    def captures(self, chunks: Sequence[int], *, adding: Sequence[int], one_run: bool) -> bool:
        """See `Store`: one new chunk at most."""
        codec = self.codec
        if len(adding) > 1:
            return False
        if self.attends or not isinstance(codec, AddressedCodec) or self._scratch is None:
            return False
        if not codec.captures(self._scratch[0].device):
            return False
        if any(chunk not in self._blobs[-1] for chunk in chunks):
            return False
        if not adding:
            return True
        # layers encode one after the other
        forms, layers = self._forms.get(adding[0]), (0, len(self._blobs) - 1)
        if forms is None or self.hot_chunks:
            return False
        return all(
            codec.is_ready(like, side=side, layer=i)
            for like, side in zip(forms, SIDES, strict=True)
            for i in layers
        )

    def reserve(self, chunk: int, tokens: int) -> None:
        """Memory for the codes of a chunk that a captured pass is about to encode."""
        key, value = (
            like.likes(len(self._blobs), self.scratch[0].device) for like in self._forms[tokens]
        )
        for blobs, *pair in zip(self._blobs, key, value, strict=True):
            blobs[chunk] = (pair[0], pair[1])
        self._forget_place_of(chunk)

    def groups(self, pieces: Sequence[Piece]) -> list[Group]:
        """Whole coded chunks as `Group`s that lay them down in the order of `pieces`."""
        wanted = _whole(pieces)
        if self._groups is None or self._groups[0] != wanted:
            self._groups = wanted, self._grouped(wanted)
        return self._groups[1]

    def read(self, layer: int, pieces: Sequence[Piece]) -> Pair:
        """See `Store`: of whole chunks, as views of the scratch buffer."""
        return self._restored(layer, _whole(pieces), None)

    def gather(self, layer: int, past: Sequence[Piece], own: Sequence[Piece], pair: Pair) -> Pair:
        """See `Store`: what is coded is what is attended to, a chunk sees its coded self."""
        if own and not self.hot_chunks:
            return self.read(layer, [*past, *own])
        return self._restored(layer, _whole(past), pair)

    def _restored(self, layer: int, pieces: Sequence[Piece], own: Pair | None) -> Pair:
        like = own or self.plain(layer, _id(pieces[0]))
        total = _tokens_of(pieces) + (own[0].shape[1] if own else 0)
        keys, values = (x[:, :total] for x in self._room(like, total))
        together = self._together(pieces)
        if together:
            for group in self.groups(pieces[:together]):
                group.restore(self.addressed, layer, (keys, values))
        places = runs(piece.tokens for piece in pieces)
        for piece, (at, stop) in list(zip(pieces, places, strict=True))[together:]:
            chunk = _id(piece)
            if chunk in self._hot[layer]:
                for out, x in zip((keys, values), self._hot[layer][chunk], strict=True):
                    require_form(out, x)
                    out[:, at:stop].copy_(x)
            else:
                for out, blob, side in zip(
                    (keys, values), self._blobs[layer][chunk], SIDES, strict=True
                ):
                    self.codec.decode_into(blob, out[:, at:stop], side=side)
        if own:
            at = _tokens_of(pieces)
            keys[:, at:].copy_(own[0])
            values[:, at:].copy_(own[1])
        return keys, values

    def plain(self, layer: int, chunk: int) -> Pair:
        """Keys and values of one chunk, restored into memory of their own."""
        if chunk in self._hot[layer]:
            return self._hot[layer][chunk]
        key, value = self._blobs[layer][chunk]
        return self.codec.decode(key, side="key"), self.codec.decode(value, side="value")

    def apart(self, layer: int, pair: Pair) -> Pair:
        """See `Store`: codes are memory of their own, and what stays plain is copied."""
        return pair

    def move(self, source: Spans, target: Spans) -> None:
        """See `Store`: codes lie in no slots."""

    def drop(self, chunk: int) -> None:
        self._forget_place_of(chunk)
        for blobs, hot in zip(self._blobs, self._hot, strict=True):
            blobs.pop(chunk, None)
            hot.pop(chunk, None)

    def clear(self, *, free_buffers: bool) -> None:
        self._groups, self._addresses = None, {}
        for held in (*self._blobs, *self._hot):
            held.clear()
        self.codec.reset()  # warm starts of the last video
        if free_buffers:
            self.codec, self._scratch, self._forms = self.codec.fork(), None, {}
            self._scratches += 1  # another generation: the centres will lie elsewhere

    def num_bytes(self) -> int:
        """Bytes held: codes, hot chunks, the scratch buffer and what the codec remembers."""
        held = _tensors((self._blobs, self._hot, self._scratch or ()))
        return self.codec.num_bytes() + sum(x.nbytes for x in held)

    def state(self) -> Any:
        """See `Store`. Blobs and hot chunks are never rewritten, so they are not copied."""
        return [dict(x) for x in self._blobs], [dict(x) for x in self._hot], self.codec.state()

    def load_state(self, state: Any) -> None:
        blobs, hot, own = state
        self._groups, self._addresses = None, {}
        self._blobs, self._hot = [dict(x) for x in blobs], [dict(x) for x in hot]
        self.codec.load_state(own)

    def _together(self, pieces: Sequence[Piece]) -> int:
        """How many of the first `pieces` all layers hold as codes, so that one table serves."""
        if not isinstance(self.codec, AddressedCodec):
            return 0
        coded = self._blobs[-1].keys() - {self._entering}
        return next((i for i, p in enumerate(pieces) if p.chunk not in coded), len(pieces))

    def _addresses_of(self, chunk: int) -> Tensor:
        """Addresses of a chunk's blobs by layer, key then value: int64 [2 layers, fields], host."""
        if chunk not in self._addresses:
            self._addresses[chunk] = self.addressed.addresses(
                [blob for held in self._blobs for blob in held[chunk]]
            )
        return self._addresses[chunk]

    def _forget_place_of(self, chunk: int) -> None:
        self._addresses.pop(chunk, None)
        if self._groups is not None and any(piece.chunk == chunk for piece in self._groups[0]):
            self._groups = None

    def _encode(self, layer: int, pair: Pair) -> Blobs:
        key, value = pair
        made = (
            self.codec.encode(key, side="key", layer=layer),
            self.codec.encode(value, side="value", layer=layer),
        )
        if isinstance(self.codec, AddressedCodec) and key.shape[1] not in self._forms:
            self._forms[key.shape[1]] = tuple(blob.likes(1, "meta")[0] for blob in made)
        return made

    def _grouped(self, pieces: tuple[Piece, ...]) -> list[Group]:
        device = self.scratch[0].device
        found: dict[int, list[tuple[int, int]]] = {}
        for piece, (at, _) in zip(pieces, runs(p.tokens for p in pieces), strict=True):
            found.setdefault(piece.tokens, []).append((_id(piece), at))
        groups = []
        for chunks in found.values():
            rows = torch.stack([self._addresses_of(chunk) for chunk, _ in chunks], dim=1)
            addresses = to_device(rows, device).unflatten(0, (len(self._blobs), 2))
            starts = to_device(torch.tensor([start for _, start in chunks]), device)
            key, value = self._blobs[-1][chunks[0][0]]
            form = (key.likes(1, "meta")[0], value.likes(1, "meta")[0])
            groups.append(Group(form, addresses, starts))
        return groups

    def _room(self, like: Pair, total: int) -> Pair:
        held = self._scratch
        if held is not None and all(
            form_of(x) == form_of(y) and x.shape[1] >= total
            for x, y in zip(held, like, strict=True)
        ):
            return held
        room = max(total, self.capacity)
        key, value = (x.new_empty(x.shape[0], room, *x.shape[2:]) for x in like)
        self._scratch, self._scratches = (key, value), self._scratches + 1
        return key, value


def _whole(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Chunks, which lie in slots as it comes, as one piece each."""
    chunks = groupby(pieces, key=lambda piece: piece.chunk)
    return tuple(Piece(0, _tokens_of(list(parts)), chunk, 0) for chunk, parts in chunks)


def _tokens_of(pieces: Sequence[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)


def _id(piece: Piece) -> int:
    assert piece.chunk is not None, "only chunks are coded, not a forward's own tokens"
    return piece.chunk


def _tensors(held: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists, dicts and records."""
    if isinstance(held, Tensor):
        return [held]
    if not isinstance(held, (tuple, list, dict)):
        held = getattr(held, "__dict__", {})
    items = held.values() if isinstance(held, dict) else held
    return [x for item in items for x in _tensors(item)]
