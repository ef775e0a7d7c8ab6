"""The Wan2.1 video autoencoder (also used by Wan2.2 A14B): encoder and decoder with the published
tensor names. docs/reference/encoders.md#vae-layers, #vae-names.

Nothing here knows latent statistics, files or streams; the codec (rcm/encoders/wan_vae.py) does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from rcm.encoders.wan_vae_layers import (
    EDGE,
    AttentionBlock,
    Conv,
    Resample,
    Resampling,
    ResidualBlock,
    RMSNorm,
    WatchedNet,
    number_slots,
    part,
)
from rcm.encoders.wan_vae_state import Slot, StreamState
from rcm.kernels.vae_conv_pack import Form
from rcm.kernels.vae_window import window
from rcm.kernels.vae_window_eager import Features

LATENT_CHANNELS = 16
SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4
# red, green, blue and filling: 16 bytes per pixel in 16 bits, the least that bulk copies move
PIXEL_CHANNELS = 8
LEVELS = (1, 2, 4, 4)
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes; the published network has `base_dim` 96 and 126,892,531 parameters."""

    base_dim: int = 96
    latent_channels: int = LATENT_CHANNELS


class Encoder(nn.Module):
    """Pixels [B, T, H, W, 3] to moments [B, T', H/8, W/8, 2 C]; T is 1 first, then 4 k."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * level for level in LEVELS]
        kinds: tuple[Resampling | None, ...] = ("down2d", "down3d", "down3d", None)
        self.conv1 = Conv(3, widths[0], taps=(3, 3, 3), carries=2, reads=PIXEL_CHANNELS)
        self.downsamples, width = _levels(widths, kinds, blocks=ENCODER_BLOCKS)
        self.middle = _middle(width)
        self.head = _head(width, 2 * config.latent_channels)
        self.slots = number_slots(self, self._order(), height=SPATIAL_STRIDE, width=SPATIAL_STRIDE)

    def _order(self) -> Iterator[nn.Module]:
        yield from (self.conv1, *self.downsamples, *self.middle, self.head)

    def forward(self, pixels: Tensor, state: StreamState) -> Tensor:
        """Moments of the next frames; `state` is advanced."""
        pixels = F.pad(pixels, (0, PIXEL_CHANNELS - pixels.shape[-1]))
        return _run(
            pixels,
            state,
            enter=self.conv1,
            blocks=(*self.downsamples, *self.middle),
            head=self.head,
        )


class Decoder(nn.Module):
    """Latents [B, T, h, w, C] to pixels [B, T', 8 h, 8 w, 3]; T = T' = 1 first, then T' = 4 T."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * level for level in reversed(LEVELS)]
        kinds: tuple[Resampling | None, ...] = ("up3d", "up3d", "up2d", None)
        self.conv1 = Conv(config.latent_channels, widths[0], taps=(3, 3, 3), carries=2)
        self.middle = _middle(widths[0])
        self.upsamples, width = _levels(widths, kinds, blocks=DECODER_BLOCKS)
        self.head = _head(width, 3)
        self.slots = number_slots(self, self._order())

    def _order(self) -> Iterator[nn.Module]:
        yield from (self.conv1, *self.units, self.head)

    @property
    def units(self) -> tuple[nn.Module, ...]:
        """Blocks between which it may be cut; the ends include first and last convolution."""
        return (*self.middle, *self.upsamples)

    def forward(self, x: Tensor, state: StreamState, units: range | None = None) -> Tensor:
        """Pixels of the next latent frames. `units`: only those blocks, to the features behind them
        [B, T, H, W, C], rounded as the next block would.
        """
        blocks = self.units
        part = units or range(len(blocks))
        enter = self.conv1 if part.start == 0 else None
        head = self.head if part.stop == len(blocks) else None
        return _run(x, state, enter=enter, blocks=blocks[part.start : part.stop], head=head)

    def slots_of(self, units: range) -> list[Slot]:
        """`slots`, without frames for what lies outside of `units`."""
        blocks = self.units
        ends = [self.conv1] * (units.start == 0) + [self.head] * (units.stop == len(blocks))
        parts = nn.ModuleList([*blocks[units.start : units.stop], *ends])
        mine = {conv.slot for conv in parts.modules() if isinstance(conv, Conv)}
        return [slot if i in mine else replace(slot, frames=0) for i, slot in enumerate(self.slots)]


class WanVAE(WatchedNet):
    """Encoder, decoder, and the 1x1x1 convolutions to their latents: 194 tensors, published names.

    `WanVAECodec.from_file` and `.random` give it values. Its latents are not whitened.
    """

    def __init__(self, config: WanVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or WanVAEConfig()
        c = self.config.latent_channels
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        self.conv1 = Conv(2 * c, 2 * c, taps=(1, 1, 1))
        self.conv2 = Conv(c, c, taps=(1, 1, 1))

    def use(self, form: Form | None) -> None:
        """Run every convolution in `form`, None for the best of each: for benchmarks."""
        self.generation += 1
        for module in self.modules():
            if isinstance(module, Conv):
                module.form = "auto" if form is None else form

    def encoder_state(self, *, batch: int, cells: tuple[int, int]) -> StreamState:
        """State of one encoded video (or batch in step) of latent size `cells`."""
        return StreamState(
            self.encoder.slots, batch=batch, cells=cells, dtype=self.dtype, device=self.device
        )

    def decoder_state(
        self, *, batch: int, cells: tuple[int, int], units: range | None = None
    ) -> StreamState:
        """State of a decoded video of latent size `cells`: 944,286,720 elements at 60x104. `units`:
        of those blocks alone.
        """
        slots = self.decoder.slots if units is None else self.decoder.slots_of(units)
        return StreamState(slots, batch=batch, cells=cells, dtype=self.dtype, device=self.device)

    def encode_step(self, pixels: Tensor, state: StreamState) -> Tensor:
        """Latent means [B, T', h, w, C] of the next pixels [B, T, H, W, 3]: one first, then 4 k.

        The log-variance that the published network also predicts is dropped.
        """
        moments = self.conv1.pointwise(self.encoder(pixels, state))
        return moments[..., : self.config.latent_channels]

    def decode_step(self, x: Tensor, state: StreamState, units: range | None = None) -> Tensor:
        """Pixels [B, T', H, W, 3] of the next latents [B, T, h, w, C]: one frame first."""
        return self.decoder(
            x if units is not None and units.start else self.conv2.pointwise(x), state, units
        )


def _levels(
    widths: Sequence[int], kinds: Sequence[Resampling | None], *, blocks: int
) -> tuple[nn.ModuleList, int]:
    """The residual blocks of every level, each level's resampling behind them; the last width."""
    found: list[nn.Module] = []
    width = widths[0]
    for wider, kind in zip(widths, kinds, strict=True):
        for _ in range(blocks):
            found.append(ResidualBlock(width, wider))
            width = wider
        if kind is not None:
            found.append(Resample(width, kind=kind))
            width = width // 2 if kind.startswith("up") else width
    return nn.ModuleList(found), width


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)]
    )


def _head(channels_in: int, channels_out: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"0": RMSNorm(channels_in), "2": Conv(channels_in, channels_out, taps=(3, 3, 3), carries=2)}
    )


def _run(
    x: Tensor,
    state: StreamState,
    *,
    enter: Conv | None,
    blocks: tuple[nn.Module, ...],
    head: nn.ModuleDict | None,
) -> Tensor:
    """First convolution, blocks, norm, SiLU, last convolution, as far as they are given."""
    features = Features(x)
    if enter is not None:
        features = Features(
            enter.over(window(features, carried=state.frames(enter), border=EDGE).padded),
            enter.bias,
        )
    for block in blocks:
        features = block(features, state)
    if head is None:
        state.started = True
        return window(features).padded
    last = part(head, "2", Conv)
    padded = window(
        features,
        gamma=part(head, "0", RMSNorm).flat(),
        norm="rms_silu",
        carried=state.frames(last),
        border=EDGE,
    ).padded
    del features
    state.started = True
    return Features(last.over(padded), last.bias).total()
