"""What the codecs of Wan's latents share, the autoencoder's and the tiny decoder's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from rcm.encoders.codec import StridedSizes
from rcm.encoders.wan_vae_net import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE
from rcm.encoders.wan_vae_stream import DecodeStream, Graphs, LatentStatistics, TiledDecodeStream


class NetworkCodec(StridedSizes):
    """A frozen network, whose dtype is the codec's precision, and the statistics of its latents.

    `path`: the file of its weights, None for random ones.
    """

    temporal_stride = TEMPORAL_STRIDE
    spatial_stride = SPATIAL_STRIDE
    latent_channels = LATENT_CHANNELS
    name: str

    def __init__(
        self, net: nn.Module, statistics: LatentStatistics, *, path: str | Path | None
    ) -> None:
        self.net: Any = net.requires_grad_(False).eval()
        self.statistics = statistics
        self._path = None if path is None else str(path)

    @property
    def device(self) -> torch.device:
        return self.net.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.dtype

    @property
    def captures(self) -> bool:
        """Whether `stream` takes graphs='on'."""
        return self.device.type == "cuda"

    def to(self, device: torch.device | str) -> Self:
        """Move the weights and return self; open streams stay where they are and refuse."""
        self.net.to(device)
        return self

    def stream(
        self, *, frames_per_step: int = 1, graphs: Graphs = "off"
    ) -> DecodeStream | TiledDecodeStream:
        """A fresh `DecodeStream` for one video or batch in step; any number may be open."""
        return DecodeStream(
            self.net, self.statistics, frames_per_step=frames_per_step, graphs=graphs
        )

    def describe(self) -> dict[str, Any]:
        """Name and file, as a checkpoint's self-description stores them."""
        return {"name": self.name, "path": self._path}
