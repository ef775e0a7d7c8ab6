"""Decoding and encoding in calls, with everything remembered in the stream: any split of a video
gives the result of one call.

The first frame of a video is special (it is not folded in time); the rule is handled here, whatever
the first chunk holds. Latents at this level are whitened [B, C, T, h, w], pixels [B, 3, F, H, W];
the network's channels-last frames stay inside. docs/reference/encoders.md#vae-normalisation,
#vae-layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.process_wide import ProcessWide
from rcm.encoders.wan_vae_net import SPATIAL_STRIDE, TEMPORAL_STRIDE, WanVAE
from rcm.encoders.wan_vae_state import StreamState
from rcm.encoders.wan_vae_tiles import Tile, plan_tiles
from rcm.kernels.cuda_graph import CudaGraph

Graphs = Literal["off", "on"]

StateCopy = tuple[int, tuple[int, int], tuple[bool, list[Tensor]]]
"""Batch, cells, and the frames of a stream that has begun."""


class ChunkDecoder(Protocol):
    """What a `DecodeStream` runs; `generation` counts changes of its weights."""

    config: Any
    generation: int

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""

    def decoder_state(self, *, batch: int, cells: tuple[int, int]) -> StreamState:
        """A video that has not begun, of latent size `cells`."""

    def decode_step(self, latents: Tensor, state: StreamState) -> Tensor:
        """Pixels [B, T', H, W, 3] of the next latents [B, T, h, w, C]: one frame first."""


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and deviation per channel of the network's latents, float64 [C]."""

    mean: Tensor
    std: Tensor

    def to(self, device: torch.device) -> LatentStatistics:
        """On `device`, so that no step copies from the host."""
        return LatentStatistics(self.mean.to(device), self.std.to(device))

    def whiten(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std over the last axis, in the dtype of `latents`."""
        return (latents - self.mean.to(latents)) * (1 / self.std).to(latents)

    def colour(self, latents: Tensor) -> Tensor:
        """latents * std + mean over the last axis, in the dtype of `latents`."""
        return latents * self.std.to(latents) + self.mean.to(latents)


class DecodeStream:
    """A `LatentStream` over one video, or one batch in step. `frames_per_step` latent frames go
    through the network at once.

    `graphs="on"` (CUDA): the first steady step of a length runs as usual, the second is captured,
    later ones are replayed; one capture per length, bound to this stream. Memory: the state (1.8
    GiB in bfloat16 at 480x832) and the activations of one step.
    """

    def __init__(
        self,
        vae: ChunkDecoder,
        statistics: LatentStatistics,
        *,
        frames_per_step: int = 1,
        graphs: Graphs = "off",
    ) -> None:
        if frames_per_step < 1:
            raise ConfigError(f"frames_per_step={frames_per_step} must be at least 1 latent frame")
        if graphs not in ("off", "on"):
            raise ConfigError(f"graphs must be 'off' or 'on', got {graphs!r}")
        if graphs == "on" and vae.device.type != "cuda":
            raise ConfigError(
                f"graphs='on' needs a CUDA device, the autoencoder is on {vae.device}; use"
                " graphs='off'"
            )
        self._vae, self._statistics = vae, statistics.to(vae.device)
        self._frames_per_step, self._graphs = frames_per_step, graphs
        self._state: StreamState | None = None
        self._half_done = False
        self._captured: dict[int, _CapturedStep | None] = {}
        self._generation = vae.generation

    @property
    def state(self) -> StreamState | None:
        """What is remembered; None before the first chunk."""
        return self._state

    def decode_chunk(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, f, H, W] of the next whitened latent frames [B, C, t, h, w], in the dtype
        of `latents` on the codec's device.

        f = 4 t, less 3 in the first call. `ConfigError` for another batch or size than the first
        chunk's; `RuntimeError` after a call that failed half-way (out of memory, say), since what
        is remembered is then of two moments.
        """
        if self._half_done:
            raise RuntimeError(
                "an earlier chunk of this stream failed half-way; restart() it or open a new one"
                " with codec.stream()"
            )
        require_latents(latents, channels=self._vae.config.latent_channels)
        batch, _, count, *cells = latents.shape
        with network_scope(self._vae):
            state = self._fitting(batch, (cells[0], cells[1]))
            frames = TEMPORAL_STRIDE * count - (0 if state.started else TEMPORAL_STRIDE - 1)
            size = (batch, 3, frames, SPATIAL_STRIDE * cells[0], SPATIAL_STRIDE * cells[1])
            self._half_done = True
            pixels = self._through(latents, size, state)
        self._half_done = False
        return pixels

    def _fitting(self, batch: int, cells: tuple[int, int]) -> StreamState:
        """What is remembered of such a video; `ConfigError` where it is of another."""
        if self._state is None:
            self._state = self._vae.decoder_state(batch=batch, cells=cells)
        self._state.require_fit(
            batch=batch, cells=cells, device=self._vae.device, dtype=self._vae.dtype
        )
        return self._state

    def _through(self, latents: Tensor, size: tuple[int, ...], state: StreamState) -> Any:
        """Pixels of `size` of checked latents, part by part."""
        pixels, done = latents.new_empty(size, device=self._vae.device), 0
        for part in steps_of(
            latents.shape[2], first_alone=not state.started, most=self._frames_per_step
        ):
            piece = self._step(self._prepared(latents[:, :, part]), state)
            pixels[:, :, done : done + piece.shape[1]] = piece.permute(0, 4, 1, 2, 3)
            done += piece.shape[1]
        return pixels

    def restart(self) -> None:
        """Begin another video of the same batch and size, with memory and captures of this."""
        self._half_done = False
        if self._state is not None:
            self._state.restart()

    def state_copy(self) -> StateCopy | None:
        state = self._state
        return None if state is None else (state.batch, state.cells, state.copy())

    def load_state(self, state: StateCopy | None) -> None:
        if state is None:
            self.restart()
            return
        batch, cells, frames = state
        with network_scope(self._vae):
            self._fitting(batch, cells).load(frames)
        self._half_done = False

    def num_bytes(self) -> int:
        return 0 if self._state is None else self._state.num_bytes()

    def bytes_for(self, *, batch: int, cells: tuple[int, int]) -> int:
        """What `num_bytes` will be for such a video: every slot grows with the number of cells."""
        per_cell = self._vae.decoder_state(batch=1, cells=(1, 1)).num_bytes()
        return per_cell * batch * cells[0] * cells[1]

    def _prepared(self, latents: Tensor) -> Tensor:
        """Channels-last latents of the network: statistics in float32 or wider, one cast."""
        moved = latents.to(self._vae.device).permute(0, 2, 3, 4, 1)
        wide = moved.to(torch.promote_types(moved.dtype, torch.float32))
        return self._statistics.colour(wide).to(self._vae.dtype).contiguous()

    def _step(self, frames: Tensor, state: StreamState) -> Tensor:
        if self._graphs == "off" or not state.started:
            return self._vae.decode_step(frames, state)
        if self._generation != self._vae.generation:
            # captured steps read the weights where they were
            self._captured.clear()
            self._generation = self._vae.generation
        count = frames.shape[1]
        if count not in self._captured:
            # compiles kernels and packs weights, which a capture may not
            piece = self._vae.decode_step(frames, state)
            self._captured[count] = None
            return piece
        captured = self._captured[count]
        if captured is None:
            captured = self._captured[count] = _CapturedStep(self._vae, state, frames)
        return captured.replay(frames)


class _CapturedStep:
    """One steady step of a stream as a CUDA graph."""

    def __init__(self, vae: ChunkDecoder, state: StreamState, frames: Tensor) -> None:
        self._input, self._output = frames.clone(), frames
        self._graph = CudaGraph(
            lambda: setattr(self, "_output", vae.decode_step(self._input, state)), frames.device
        )

    def replay(self, frames: Tensor) -> Tensor:
        """Pixels of `frames`; overwritten by the next replay."""
        self._input.copy_(frames)
        self._graph.replay()
        return self._output


class TiledDecodeStream:
    """A `LatentStream` that decodes tile by tile and blends; every tile remembers its frames."""

    def __init__(
        self, vae: WanVAE, statistics: LatentStatistics, *, tile: int, frames_per_step: int = 1
    ) -> None:
        plan_tiles((tile, tile), tile=tile, scale=SPATIAL_STRIDE)
        self._vae, self._statistics, self._tile = vae, statistics, tile
        self._frames_per_step = frames_per_step
        self._tiles: list[tuple[Tile, DecodeStream]] = []
        self._cells: tuple[int, int] | None = None

    @torch.no_grad()
    def decode_chunk(self, latents: Tensor) -> Tensor:
        """As `DecodeStream.decode_chunk`; blended in float32 or wider."""
        require_latents(latents, channels=self._vae.config.latent_channels)
        cells = (latents.shape[3], latents.shape[4])
        if self._cells is None:
            self._open(cells)
        if cells != self._cells:
            raise ConfigError(
                f"this stream decodes {self._cells} latent cells, got {cells}; open one stream per"
                " video with codec.stream()"
            )
        return blend_tiles(self._tiles, latents)

    def state_copy(self) -> Any:
        """One copy per tile."""
        return self._cells, [stream.state_copy() for _, stream in self._tiles]

    def load_state(self, state: Any) -> None:
        cells, copies = state
        if cells is None:
            self._cells, self._tiles = None, []
            return
        self._open(cells)
        for (_, stream), copy in zip(self._tiles, copies, strict=True):
            stream.load_state(copy)

    def num_bytes(self) -> int:
        return sum(stream.num_bytes() for _, stream in self._tiles)

    def bytes_for(self, *, batch: int, cells: tuple[int, int]) -> int:
        """As `DecodeStream.bytes_for`, over all tiles."""
        plan = plan_tiles(cells, tile=self._tile, scale=SPATIAL_STRIDE)
        return sum(self._stream().bytes_for(batch=batch, cells=t.cells) for t in plan)

    def _open(self, cells: tuple[int, int]) -> None:
        self._cells = cells
        plan = plan_tiles(cells, tile=self._tile, scale=SPATIAL_STRIDE)
        self._tiles = [(t, self._stream()) for t in plan]

    def _stream(self) -> DecodeStream:
        return DecodeStream(self._vae, self._statistics, frames_per_step=self._frames_per_step)


def decode_in_tiles(
    vae: WanVAE, statistics: LatentStatistics, latents: Tensor, *, tile: int, frames_per_step: int
) -> Tensor:
    """A whole video, tile after tile, so that one tile's state is in memory at a time."""
    plan = plan_tiles((latents.shape[3], latents.shape[4]), tile=tile, scale=SPATIAL_STRIDE)
    step = frames_per_step
    streams = ((t, DecodeStream(vae, statistics, frames_per_step=step)) for t in plan)
    return blend_tiles(streams, latents)


def blend_tiles(tiles: Iterable[tuple[Tile, DecodeStream]], latents: Tensor) -> Tensor:
    """Pixels of the next latent frames of every tile, weighted and added."""
    total: Tensor | None = None
    height, width = (SPATIAL_STRIDE * n for n in latents.shape[3:])
    for tile, stream in tiles:
        piece = stream.decode_chunk(latents[..., tile.rows, tile.columns])
        if total is None:
            wide = torch.promote_types(piece.dtype, torch.float32)
            total = piece.new_zeros(*piece.shape[:3], height, width, dtype=wide)
        tile.add(piece, total, scale=SPATIAL_STRIDE)
        del stream
    assert total is not None  # there are tiles
    return total.to(latents.dtype)


def encode_frames(
    vae: WanVAE, statistics: LatentStatistics, video: Tensor, *, frames_per_step: int
) -> Tensor:
    """Whitened latents [B, C, T, h, w], float32 or wider, of pixels [B, 3, F, H, W], F = 1 + 4 k;
    steps of `frames_per_step` pixel frames, each moved to the autoencoder's device alone.
    """
    batch, _, count, height, width = video.shape
    cells = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    statistics, pieces = statistics.to(vae.device), []
    with network_scope(vae):
        state = vae.encoder_state(batch=batch, cells=cells)
        for part in steps_of(count, first_alone=True, most=frames_per_step):
            frames = video[:, :, part].to(vae.device, vae.dtype).permute(0, 2, 3, 4, 1)
            means = vae.encode_step(frames, state)
            wide = means.to(torch.promote_types(means.dtype, torch.float32))
            pieces.append(statistics.whiten(wide).permute(0, 4, 1, 2, 3))
    return torch.cat(pieces, dim=2)


def require_latents(latents: Tensor, *, channels: int) -> None:
    """`ConfigError` unless floating [B, channels, T, h, w] with T >= 1."""
    if (
        latents.ndim != 5
        or latents.shape[1] != channels
        or min(latents.shape) < 1
        or not latents.is_floating_point()
    ):
        raise ConfigError(
            f"this decoder reads floating latents [B, {channels}, T, h, w], got {latents.dtype} of"
            f" shape {tuple(latents.shape)}"
        )


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """No TF32, and no search among algorithms."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    if backends.fp32_precision == "none":
        with cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            yield
        return
    # where that chose one for all, the flags leave TF32 on, or raise
    precision, search = cudnn.conv.fp32_precision, cudnn.benchmark
    cudnn.conv.fp32_precision, cudnn.benchmark = "ieee", False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.conv.fp32_precision = search, "none"
        if cudnn.conv.fp32_precision != precision:  # else it goes on following the general one
            cudnn.conv.fp32_precision = precision


EXACT = ProcessWide(_exact_convolutions)
"""The same while any thread is in a network."""


@contextlib.contextmanager
def network_scope(vae: WanVAE | ChunkDecoder) -> Iterator[None]:
    """The codec's dtype is its precision: no autocast, and no TF32 in float32 convolutions. No
    gradients, and no inference mode of a caller: what it allocates, calls out of that could not
    write to.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(vae.device.type, enabled=False),
        EXACT if vae.device.type == "cuda" else contextlib.nullcontext(),
    ):
        yield


def steps_of(count: int, *, first_alone: bool, most: int) -> Iterator[slice]:
    """Slices of `count` frames, at most `most` each; the first alone at the start of a video."""
    start = 1 if first_alone and count else 0
    if start:
        yield slice(0, 1)
    for begin in range(start, count, most):
        yield slice(begin, min(begin + most, count))
