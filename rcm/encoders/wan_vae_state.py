"""What an autoencoder remembers between calls on a video: frames per convolution.

They are allocated once, outside the module, and overwritten in place: one module serves any number
of streams, and a CUDA graph can hold a step. docs/reference/encoders.md#vae-layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rcm.core.errors import ConfigError


@dataclass(frozen=True)
class Slot:
    """The frames that one convolution remembers, and its image size per latent cell."""

    frames: int
    rows: int
    columns: int
    channels: int


class Carrying(Protocol):
    """A convolution that knows which slot is its own."""

    slot: int


class StreamState:
    """Frames [B, K, H, W, C] of every slot, and whether the first frame of the video has passed.

    At its start they are zeros, which is the causal padding. `cells` = (h, w) of the latent image.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        batch: int,
        cells: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.batch, self.cells, self.started = batch, cells, False
        self._frames = tuple(
            torch.zeros(
                batch,
                s.frames,
                s.rows * cells[0],
                s.columns * cells[1],
                s.channels,
                dtype=dtype,
                device=device,
            )
            for s in slots
        )

    def frames(self, conv: Carrying) -> Tensor:
        """The frames that `conv` remembers, to be read and overwritten in place."""
        return self._frames[conv.slot]

    def numel(self) -> int:
        """Elements of all slots together."""
        return sum(frames.numel() for frames in self._frames)

    def copy(self) -> tuple[bool, list[Tensor]]:
        """Everything remembered, as copies."""
        return self.started, [frames.clone() for frames in self._frames]

    def load(self, copy: tuple[bool, list[Tensor]]) -> None:
        """Take up a `copy`; addresses stay."""
        self.started = copy[0]
        for mine, frames in zip(self._frames, copy[1], strict=True):
            mine.copy_(frames)

    def num_bytes(self) -> int:
        return sum(frames.nbytes for frames in self._frames)

    def restart(self) -> None:
        """Forget the video; addresses stay."""
        self.started = False
        for frames in self._frames:
            frames.zero_()

    def require_fit(
        self, *, batch: int, cells: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        """`ConfigError` unless such a chunk, on such weights, belongs to the video at hand."""
        if (batch, cells) != (self.batch, self.cells):
            raise ConfigError(
                f"this stream serves a batch of {self.batch} at {self.cells[0]}x{self.cells[1]}"
                f" latent cells, got {batch} at {cells[0]}x{cells[1]}; open one stream per video"
                " with codec.stream()"
            )
        mine = self._frames[0]
        if (mine.device, mine.dtype) != (device, dtype):
            raise ConfigError(
                f"this stream began on {mine.device} in {mine.dtype}, the weights are now on"
                f" {device} in {dtype}; move them back or open a new stream with codec.stream()"
            )
