"""The decoder of TAEHV (Boer Bohan, github.com/madebyollin/taehv) for Wan2.1's whitened latents:
pictures of lower quality than the autoencoder's own, at a few per cent of its arithmetic.

Parameters carry the published names and shapes; frames are channels-last: [B, T, H, W, C]. A block
with memory sees each frame and the one before it, zeros at the start of a video.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.encoders.wan_vae_layers import WatchedNet, part
from rcm.encoders.wan_vae_net import LATENT_CHANNELS, TEMPORAL_STRIDE
from rcm.encoders.wan_vae_state import Slot, StreamState

BLOCKS = 3
BOUND = 3.0
"""Latents are bent softly into (-BOUND, BOUND)."""


@dataclass(frozen=True)
class Level:
    """Blocks of `width` channels, doubling, `grow` frames of one, convolution to `narrower`."""

    width: int
    grow: int
    narrower: int


LEVELS = (Level(256, 1, 128), Level(128, 2, 64), Level(64, 2, 64))


@dataclass(frozen=True)
class TinyConfig:
    """Sizes; the published ones by default."""

    levels: tuple[Level, ...] = LEVELS
    latent_channels: int = LATENT_CHANNELS


class MemoryBlock(nn.Module):
    """relu(x + three convolutions of (x, the frame before)), with a ReLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = {"0": 2 * width, "2": width, "4": width}
        self.conv = nn.ModuleDict(
            {name: nn.Conv2d(read, width, 3, padding=1) for name, read in widths.items()}
        )
        self.slot = -1

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        """Frames of the same shape; `state` then holds the last frame of `x`."""
        memory = state.frames(self)
        y = torch.cat([x, torch.cat([memory, x[:, :-1]], dim=1)], dim=-1)
        memory.copy_(x[:, -1:])
        for name in self.conv:
            y = convolved(part(self.conv, name, nn.Conv2d), F.relu(y) if name != "0" else y)
        return F.relu(x + y)


class Grow(nn.Module):
    """`stride` frames of each, by a product over channels: one group of outputs per frame."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] to [B, stride T, H, W, C]."""
        grown = F.linear(x, self.conv.weight.flatten(1))
        return grown.unflatten(4, (self.stride, -1)).movedim(4, 2).flatten(1, 2)


class TinyDecoder(WatchedNet):
    """Whitened latents to pixels, with a `StreamState` per stream; made by `TinyDecoderCodec`."""

    def __init__(self, config: TinyConfig | None = None) -> None:
        super().__init__()
        self.config = config or TinyConfig()
        levels, channels = self.config.levels, self.config.latent_channels
        layers: dict[str, nn.Module] = {"1": nn.Conv2d(channels, levels[0].width, 3, padding=1)}
        self._slots: list[Slot] = []
        place, scale = 3, 1
        for level in levels:
            for _ in range(BLOCKS):
                layers[str(place)] = block = MemoryBlock(level.width)
                block.slot = len(self._slots)
                self._slots.append(Slot(frames=1, rows=scale, columns=scale, channels=level.width))
                place += 1
            # the published list has the doubling here, which has no parameters
            layers[str(place + 1)] = Grow(level.width, level.grow)
            layers[str(place + 2)] = nn.Conv2d(
                level.width, level.narrower, 3, padding=1, bias=False
            )
            place, scale = place + 3, 2 * scale
        layers[str(place + 1)] = nn.Conv2d(levels[-1].narrower, 3, 3, padding=1)
        self.decoder = nn.ModuleDict(layers)

    def decoder_state(self, *, batch: int, cells: tuple[int, int]) -> StreamState:
        """State of one decoded video (or batch in step) of latent size `cells`."""
        return StreamState(
            self._slots, batch=batch, cells=cells, dtype=self.dtype, device=self.device
        )

    def decode_step(self, latents: Tensor, state: StreamState) -> Tensor:
        """Pixels [B, T', 8 h, 8 w, 3] in [-1, 1], not clamped, of the next latent frames [B, T, h,
        w, C]; T' = 4 T, and 3 less in the first call: of the frames that the first latent frame
        grows into, the video begins with the last.
        """
        x = BOUND * torch.tanh(latents / BOUND)
        last = len(self.decoder) - 1
        for index, layer in enumerate(self.decoder.values()):
            if isinstance(layer, MemoryBlock):
                x = layer(x, state)
            elif isinstance(layer, Grow):
                # published in the other order: the same values, for four times the work
                x = doubled(layer(x))
            else:
                assert isinstance(layer, nn.Conv2d)
                x = convolved(layer, F.relu(x) if index == last else x)
                x = F.relu(x) if index == 0 else x
        skipped = 0 if state.started else TEMPORAL_STRIDE - 1
        state.started = True
        return 2 * x[:, skipped:] - 1


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` of every frame of `x` [B, T, H, W, C]."""
    return conv(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def doubled(x: Tensor) -> Tensor:
    """Every pixel of [B, T, H, W, C] as two by two."""
    b, t, h, w, c = x.shape
    return x[:, :, :, None, :, None].expand(b, t, h, 2, w, 2, c).reshape(b, t, 2 * h, 2 * w, c)
