"""What a cache asks of a codec that stores its keys and values: the least, reading by address, and
correcting the bias of coded keys. `rcm.kernels.kv_codec.codec.KVCodec` does all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rcm.nets.kv_store import Side

SIDES: tuple[Side, Side] = ("key", "value")


class KVCodec(Protocol):
    """Storage format of a cache: a blob per layer, chunk and side; what has no body is optional."""

    def encode(self, x: Tensor, *, side: Side, layer: int) -> Any:
        """Blob of `x` [B, S, N, D]."""

    def decode(self, blob: Any, *, side: Side) -> Tensor:
        """[B, S, N, D] of a blob, in the dtype that was encoded."""

    def decode_into(self, blob: Any, out: Tensor, *, side: Side) -> None:
        """`decode`, written into `out` [B, S, N, D] (any strides)."""

    def num_bytes(self) -> int:
        """Bytes that the codec holds beside the blobs."""
        return 0

    def fork(self) -> KVCodec:
        """The same settings for another stream, which remembers nothing of this one."""
        return self

    def state(self) -> Any:
        """A copy of what the codec remembers of the chunks that it encoded."""

    def load_state(self, state: Any) -> None:
        """Take up a `state`."""

    def reset(self) -> None:
        """Forget: a new video begins."""


@runtime_checkable
class AddressedCodec(KVCodec, Protocol):
    """A codec whose blobs have addresses, which captured passes find as data on the device.

    A blob has `likes(count, device)`, blobs of the same form with memory of their own; on "meta"
    the form alone. `generation` changes with the place of what `encode_to` reads and writes beside
    the blob.
    """

    generation: int

    def captures(self, device: torch.device) -> bool:
        """Whether `restore` and `encode_to` can be captured on `device`."""

    def addresses(self, blobs: Sequence[Any]) -> Tensor:
        """Where blobs lie, int64 [blobs, fields] on the host."""

    def restore(
        self,
        like: Any,
        table: Tensor,
        starts: Tensor,
        out: Tensor,
        *,
        side: Side,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write the blobs at `table` [P, fields], all in the form of `like`, into `out` [B, L, N,
        D] from its tokens `starts` [P] on; `turn`: rotated by cos and sin [L, D / 2].
        """

    def encode_to(self, row: Tensor, x: Tensor, *, side: Side, layer: int) -> None:
        """`encode`, into the blob at `row` [fields]."""

    def is_ready(self, like: Any, *, side: Side, layer: int) -> bool:
        """Whether `encode_to` in the form of `like` would do the same again and again."""


@runtime_checkable
class CorrectingCodec(KVCodec, Protocol):
    """A codec that knows by how much attention to its keys is too large."""

    @property
    def corrects_bias(self) -> bool:
        """Whether that is to be taken off."""

    def key_gain(self, q: Tensor, blob: Any, *, scale: float, rotated: bool) -> Tensor:
        """[B, N, L]: what to take off the log-sum-exp of the scaled logits of rotated queries `q`
        [B, L, N, D] over the keys in `blob`; `rotated`: they were coded before rotation.
        """
