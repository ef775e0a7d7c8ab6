"""The Wan decoder in stages, one per rank: a stage decodes the frame after the next stage's.

Between stages goes the rounded sum that the next block would make first, so pixels are those of the
whole decoder, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_layers import Conv, NearestThenConv, Resample, ResidualBlock, part
from rcm.encoders.wan_vae_net import Decoder, WanVAE
from rcm.encoders.wan_vae_state import StreamState
from rcm.encoders.wan_vae_stream import DecodeStream, Graphs, LatentStatistics, steps_of

NARROW = 72
"""A convolution of C channels takes 1 + NARROW / C times as long as its arithmetic says: at 96
channels, where a third of the arithmetic is, half of the time is spent.
"""
AHEAD = 2
"""Latent frames that a stage is ready to receive before it needs them."""


class Sink(Protocol):
    """Where a stage's results go."""

    def send(self, x: Tensor) -> None:
        """Hand over `x`, which is not written again."""

    def release(self) -> None:
        """No more for now: keep nothing that has arrived."""


class Source(Protocol):
    """Where a stage's inputs come from, in the order in which they are expected."""

    def expect(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> None:
        """Be ready for the next one."""

    def take(self) -> Tensor:
        """The oldest that is expected."""


@dataclass(frozen=True)
class Boundary:
    """What the block behind it is given: `frames` per latent frame, `scale` pixels per cell."""

    channels: int
    frames: int
    scale: int


def stages_of(decoder: Decoder, count: int) -> list[range]:
    """The blocks as `count` stages, the longest as short as can be; `ValueError` for too many."""
    costs = [_cost(block, boundary_before(decoder, i)) for i, block in enumerate(decoder.units)]
    if not 1 <= count <= len(costs):
        raise ValueError(
            f"a decoder of {len(costs)} blocks makes 1 to {len(costs)} stages, not {count}"
        )
    choices = ([0, *cuts, len(costs)] for cuts in combinations(range(1, len(costs)), count - 1))
    best = min(choices, key=lambda bounds: max(sum(costs[a:b]) for a, b in pairwise(bounds)))
    return [range(a, b) for a, b in pairwise(best)]


def boundary_before(decoder: Decoder, unit: int) -> Boundary:
    """What block `unit` of `decoder` is given."""
    channels, frames, scale = decoder.conv1.weight.shape[0], 1, 1
    for block in decoder.units[:unit]:
        if isinstance(block, ResidualBlock):
            channels = part(block.residual, "6", Conv).weight.shape[0]
        if isinstance(block, Resample):
            channels, scale = part(block.resample, "1", Conv).weight.shape[0], 2 * scale
            frames *= 2 if block.kind == "up3d" else 1
    return Boundary(channels, frames, scale)


def _cost(block: torch.nn.Module, at: Boundary) -> float:
    """Time of a block per latent frame, up to a factor."""
    total = 0.0
    for conv in (m for m in block.modules() if isinstance(m, Conv)):
        # four pixels of twice the image, with 4 of 9 taps
        taps, frames = 1.0, at.frames
        if isinstance(conv, NearestThenConv):
            taps, frames = 16 / 9, at.frames * (2 if block.kind == "up3d" else 1)
        work = conv.weight.numel() * taps * frames * at.scale**2
        total += work * (1 + NARROW / conv.weight.shape[1])
    return total


class StagedCodec:
    """A stage of a decoder, as a codec: its streams take the same latents on all stages, and return
    pixels on the last, None before. `collective` says that they wait for other ranks.
    """

    collective = True

    def __init__(
        self, codec: WanVAECodec, units: range, *, source: Source | None, sink: Sink | None
    ) -> None:
        self.codec, self.units, self._source, self._sink = codec, units, source, sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def stream(self, *, graphs: Graphs = "off") -> StageStream:
        """A fresh streaming decoder."""
        part = _Part(self.codec.vae, self.units)
        return StageStream(
            part, self.codec.statistics, graphs=graphs, source=self._source, sink=self._sink
        )


class _Part:
    """Some blocks of a decoder, as a `ChunkDecoder`."""

    def __init__(self, vae: WanVAE, units: range) -> None:
        self.vae, self.units = vae, units
        self.decoder_state: Callable[..., StreamState] = lambda **shape: vae.decoder_state(
            units=units, **shape
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def decode_step(self, x: Tensor, state: StreamState) -> Tensor:
        return self.vae.decode_step(x, state, self.units)


class StageStream(DecodeStream):
    """A `DecodeStream` of one stage, one latent frame at a time."""

    def __init__(
        self,
        part: _Part,
        statistics: LatentStatistics,
        *,
        graphs: Graphs,
        source: Source | None,
        sink: Sink | None,
    ) -> None:
        super().__init__(part, statistics, graphs=graphs)
        self._source, self._sink = source, sink
        self._before = boundary_before(part.vae.decoder, part.units.start)

    def close(self) -> None:
        """The video is over."""
        if self._sink is not None:
            self._sink.release()

    def _through(self, latents: Tensor, size: tuple[int, ...], state: StreamState) -> Any:
        sink, done, pixels = self._sink, 0, latents.new_empty(0)
        if sink is None:
            pixels = latents.new_empty(size, device=self._vae.device)
        parts = list(steps_of(latents.shape[2], first_alone=not state.started, most=1))
        expected = [
            self._expected(state, first=i == 0 and not state.started) for i in range(len(parts))
        ]
        for shape in expected[:AHEAD]:
            self._expect(shape)
        for i, frames in enumerate(parts):
            source = self._source
            taken = self._prepared(latents[:, :, frames]) if source is None else source.take()
            piece = self._step(taken, state)
            for shape in expected[i + AHEAD : i + AHEAD + 1]:
                self._expect(shape)
            if sink is not None:
                # the next replay writes it again
                sink.send(piece if self._graphs == "off" else piece.clone())
            else:
                pixels[:, :, done : done + piece.shape[1]] = piece.permute(0, 4, 1, 2, 3)
                done += piece.shape[1]
        return pixels if sink is None else None

    def _expected(self, state: StreamState, *, first: bool) -> tuple[int, ...]:
        at, frames = self._before, 1 if first else self._before.frames
        height, width = (at.scale * cells for cells in state.cells)
        return state.batch, frames, height, width, at.channels

    def _expect(self, shape: tuple[int, ...]) -> None:
        if self._source is not None:
            self._source.expect(shape, dtype=self._vae.dtype, device=self._vae.device)
