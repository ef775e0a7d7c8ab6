"""A codec with the strides and channels of Wan's VAE and no weights: block means of the pixels, and
back, so that tests can see through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm.encoders.codec import StridedSizes


class StandInCodec(StridedSizes):
    """A `LatentCodec`: channels 0..2 are the mean colours of a cell in the last frame of its group,
    the others their square.
    """

    temporal_stride, spatial_stride, latent_channels = 4, 8, 16

    def __init__(self) -> None:
        self.moves: list[torch.device] = []

    def encode(self, video: Tensor) -> Tensor:
        frames = [0, *range(4, video.shape[2], 4)]
        colours = torch.nn.functional.avg_pool3d(video[:, :, frames], (1, 8, 8))
        return torch.cat([colours, *(colours[:, :1] ** (2 + k) for k in range(13))], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        pixels = latents[:, :3].repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
        return torch.cat([pixels[:, :, :1], pixels[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)

    def stream(self):
        raise NotImplementedError("whole videos only")

    def to(self, device: torch.device) -> StandInCodec:
        self.moves.append(torch.device(device))
        return self
