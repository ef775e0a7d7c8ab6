"""A codec that keeps what it restored, for caches quantised for their effect, not their size."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from rcm.nets.kv_coded import CorrectingCodec, KVCodec
from rcm.nets.kv_store import Side


class MemoisedCodec:
    """`codec`, with every blob restored once and kept, in plain form, as long as the blob lives."""

    def __init__(self, codec: KVCodec) -> None:
        self.codec = codec
        self._kept: dict[int, Tensor] = {}

    @property
    def corrects_bias(self) -> bool:
        return isinstance(self.codec, CorrectingCodec) and self.codec.corrects_bias

    def key_gain(self, q: Tensor, blob: Any, *, scale: float, rotated: bool) -> Tensor:
        assert isinstance(self.codec, CorrectingCodec)
        return self.codec.key_gain(q, blob, scale=scale, rotated=rotated)

    def encode(self, x: Tensor, *, side: Side, layer: int) -> Any:
        return self.codec.encode(x, side=side, layer=layer)

    def decode(self, blob: Any, *, side: Side) -> Tensor:
        """See `KVCodec`; not to be written to."""
        key = id(blob)
        if key not in self._kept:
            self._kept[key] = self.codec.decode(blob, side=side)
            weakref.finalize(blob, self._kept.pop, key, None)
        return self._kept[key]

    def decode_into(self, blob: Any, out: Tensor, *, side: Side) -> None:
        out.copy_(self.decode(blob, side=side))

    def num_bytes(self) -> int:
        return self.codec.num_bytes() + sum(x.nbytes for x in self._kept.values())

    def fork(self) -> MemoisedCodec:
        return MemoisedCodec(self.codec.fork())

    def state(self) -> Any:
        return self.codec.state()

    def load_state(self, state: Any) -> None:
        self.codec.load_state(state)

    def reset(self) -> None:
        self.codec.reset()
