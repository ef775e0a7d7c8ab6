"""Decoding beside denoising: on a stream of its own, pixels to the host through pinned memory;
split among the ranks that make a stream together, so that the first does not decode alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.encoders.codec import LatentCodec, LatentStream
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_stages import StagedCodec, stages_of
from rcm.parallel.links import chain
from rcm.pipelines.finite import Reading
from rcm.pipelines.stream_spec import StreamSpec

MOST_STAGES = 4
"""Of a decoder whose last third is three blocks, more would wait for the longest."""


class DecodeLane:
    """The decoder of a stream; on CUDA optionally on a stream of its own, so that it runs beside
    the denoiser. On another device than the denoiser's, if that is where the codec is.

    `to_host`: pixels also go to pinned host memory as uint8.
    """

    PRIORITY = -1
    """Before the denoiser's: pixels are there sooner, and the next chunk is issued long before this
    one is denoised. Beside transfers between ranks (rcm/parallel/links.py) no hardware queue may be
    shared with the denoiser, as streams of one priority do.
    """

    def __init__(
        self,
        codec: LatentCodec,
        *,
        device: torch.device,
        own_stream: bool,
        graphs: str,
        to_host: bool,
    ) -> None:
        self.codec, self._to_host = codec, to_host
        self._device = torch.device(getattr(codec, "device", device))
        self._cuda = self._device.type == "cuda"
        self._stream = (
            torch.cuda.Stream(self._device, priority=self.PRIORITY)
            if own_stream and self._cuda
            else None
        )
        self._captures = graphs == "on" and getattr(codec, "captures", False)
        self._decoder: LatentStream | None = self._opened()

    def restart(self) -> None:
        """Begin another video, in the memory of this one where the decoder can."""
        with self._between():
            if self._decoder is not None and hasattr(self._decoder, "restart"):
                self._decoder.restart()
            else:
                self._decoder = self._opened()

    def _opened(self) -> LatentStream:
        if self._captures:
            return cast("_Capturing", self.codec).stream(graphs="on")
        return self.codec.stream()

    @property
    def _running(self) -> LatentStream:
        assert self._decoder is not None  # open
        return self._decoder

    def decode(self, latents: Tensor) -> Decoding:
        """Start decoding the next latents. No pixels come of it where another rank has the last
        stage of the decoder.
        """
        if not self._cuda:
            here = latents.to(self._device)
            frames = self._running.decode_chunk(here)
            images = _images(frames) if self._to_host and frames is not None else None
            return Decoding(frames, images, None, Reading(here, frames))
        ready = (
            torch.cuda.current_stream(latents.device).record_event() if latents.is_cuda else None
        )
        now = torch.cuda.current_stream(self._device)
        lane = self._stream or now
        with torch.cuda.device(self._device), torch.cuda.stream(lane):
            if ready is not None:
                lane.wait_event(ready)
            here = latents.to(self._device, non_blocking=True)
            frames = self._running.decode_chunk(here)
            reading, images = Reading(here, frames), None
            if self._to_host and frames is not None:
                pixels = _images(frames)
                images = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
                images.copy_(pixels, non_blocking=True)
            done = lane.record_event()
        if lane is not now:
            if ready is not None:
                latents.record_stream(lane)
            if frames is not None:
                frames.record_stream(now)
        return Decoding(frames, images, done, reading)

    def state(self) -> Any:
        """A copy of what the decoder remembers."""
        with self._between():
            return self._running.state_copy()

    def load_state(self, state: Any) -> None:
        """Take up a `state`."""
        with self._between():
            self._running.load_state(state)

    @contextmanager
    def _between(self) -> Iterator[None]:
        """What is done here to the decoder's memory stands behind the decode under way, of a step
        that failed say, and before the next one.
        """
        if self._stream is None:
            yield
            return
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(self._stream)
        yield
        self._stream.wait_stream(now)

    def num_bytes(self) -> int:
        """Bytes that the decoder remembers."""
        decoder = self._decoder  # asked by any thread, while another one closes it
        return 0 if decoder is None else decoder.num_bytes()

    def close(self) -> None:
        """Free the decoder."""
        if self._decoder is not None and hasattr(self._decoder, "close"):
            self._decoder.close()
        self._decoder = None


class _Capturing(Protocol):
    """A codec whose `captures` says that it knows CUDA graphs."""

    def stream(self, *, graphs: Literal["on"]) -> LatentStream: ...


class Decoding:
    """Pixels on their way, and a `reading` of them that is there with them."""

    def __init__(
        self,
        frames: Tensor | None,
        images: Tensor | None,
        done: torch.cuda.Event | None,
        reading: Reading,
    ) -> None:
        self._frames, self._images, self._done, self.reading = frames, images, done, reading

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """Pixels and host images, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._frames, self._images


def new_lane(
    codec: LatentCodec | None,
    spec: StreamSpec,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> DecodeLane | None:
    """The decoder of a stream, None where this rank decodes nothing; collective over `group`, the
    ranks that make the stream together.
    """
    if group is not None:
        codec = shared_decoder(codec, ranks=spec.decode_ranks, sharing=group.size())
    if codec is None:
        return None
    return DecodeLane(
        codec, device=device, own_stream=spec.look_ahead, graphs=spec.graphs, to_host=spec.to_host
    )


def shared_decoder(
    codec: LatentCodec | None, *, ranks: int | None, sharing: int
) -> LatentCodec | None:
    """What this rank, one of `sharing` that make a stream together, decodes with: its stage of the
    Wan decoder, which the first `ranks` of them (None: up to four) run as a pipeline; None on the
    others. Rank 0 has the last stage and the pixels.

    Collective over the launch. Every rank keeps what it has where one of those has no Wan codec,
    where the codec works in tiles, and where only a part of the launch makes the stream.
    """
    world = dist.get_world_size()
    count = min(world, MOST_STAGES if ranks is None else ranks)
    if sharing != world:
        return codec
    if count < 2:
        return codec if dist.get_rank() == 0 else None
    told: list[str | None] = [None] * world
    dist.all_gather_object(
        told, codec.device.type if isinstance(codec, WanVAECodec) and codec.tile is None else None
    )
    if not all(told[:count]):
        return codec
    rank = dist.get_rank()
    above, below = chain(count, kind=str(told[0]))
    if rank >= count:
        return None
    assert isinstance(codec, WanVAECodec)  # told
    units = stages_of(codec.vae.decoder, count)[count - 1 - rank]
    return StagedCodec(codec, units, source=above, sink=below)


def _images(frames: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] in [-1, 1] as uint8 [B, F, H, W, 3], rounded to nearest."""
    return (
        ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    )
