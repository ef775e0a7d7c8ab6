"""What a sample is conditioned on: text, and for image-to-video channels and image tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Conditioning of a batch. Subclasses may add fields: tensors [B, ...], None, nested tuples.

    text     [B, L_text, E_text] embeddings; shorter than the network's text length means zero
             padding, which is attended to (docs/reference/wan.md#forward).
    concat   [B, C_extra, T, H, W] channels put after those of the latent (image-to-video: 4 mask +
             16 image latent), or None. With as many frames as the network input they are taken as
             they are; otherwise the input's frame at temporal position f takes frame f.
    image    [B, 257, 1280] CLIP tokens (Wan2.1 image-to-video), or None.
    prepared cross-attention keys and values per block of one network (`WanDiT.prepare`), or None;
             saves recomputing them at every step of a stream, in passes without gradient.
    """

    text: Tensor
    concat: Tensor | None = None
    image: Tensor | None = None
    prepared: tuple | None = None

    @property
    def batch(self) -> int:
        return self.text.shape[0]

    def expand(self, batch: int) -> Condition:
        """The same condition for `batch` samples: a batch of one is repeated (as views), an equal
        batch returned. Raises `ValueError` otherwise.
        """
        if self.batch == batch:
            return self
        if self.batch != 1:
            raise ValueError(
                f"condition of batch {self.batch} does not expand to batch {batch}; give a batch of"
                f" 1 or {batch}"
            )
        return self._map(lambda x: x.expand(batch, *x.shape[1:]))

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Condition:
        """All tensors on `device`, those of floating dtype in `dtype`; None leaves that property
        alone.
        """
        return self._map(
            lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None)
        )

    def with_images_of(self, other: Condition) -> Condition:
        """This text with the image conditioning of `other` where it has none, as negatives."""
        concat = other.concat if self.concat is None else self.concat
        image = other.image if self.image is None else self.image
        return replace(self, concat=concat, image=image)

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        found: list[Tensor] = []

        def see(x: Tensor) -> Tensor:
            found.append(x)
            return x

        self._map(see)
        return found

    def copies(self) -> Condition:
        """The same condition in memory of its own."""
        return self._map(torch.clone)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        names = [field.name for field in fields(self)]
        return replace(self, **{n: _map_tensors(getattr(self, n), change) for n in names})


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to the tensors of nested tuples and records."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return change(value)
    items = [_map_tensors(item, change) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
