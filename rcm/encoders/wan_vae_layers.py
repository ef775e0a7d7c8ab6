"""Building blocks of the Wan video autoencoder, in the cached form that defines it: every
convolution over time sees the last frames of its input in earlier calls
(docs/reference/encoders.md#vae-layers).

Parameters carry the names and shapes of the published file. Frames are channels-last everywhere:
[B, T, H, W, C]. A block takes and returns `Features`, a sum that the next window carries out, so
bias and residual cost no pass of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.encoders.wan_vae_state import Slot, StreamState
from rcm.kernels.vae_conv import convolve
from rcm.kernels.vae_conv_pack import Form, PackedKernel, best_form, fold_nearest, pack
from rcm.kernels.vae_window import window
from rcm.kernels.vae_window_eager import Features

Resampling = Literal["down2d", "down3d", "up2d", "up3d"]
EDGE = (1, 1)


M = TypeVar("M", bound=nn.Module)


def part(parts: nn.ModuleDict, name: str, kind: type[M]) -> M:
    """`parts[name]`, which is of `kind`."""
    found = parts[name]
    assert isinstance(found, kind)
    return found


class WatchedNet(nn.Module):
    """A network of one dtype on one device that counts changes of its weights (`generation`):
    captured steps read them where they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generation = 0

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> object:
        self.generation += 1
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.generation += 1
        return super()._apply(fn, recurse)


class RMSNorm(nn.Module):
    """gamma [C, 1, ...] with `axes` trailing ones: y = x / |x| * sqrt(C) * gamma."""

    def __init__(self, channels: int, *, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))

    def flat(self) -> Tensor:
        """gamma as [C]."""
        return self.gamma.flatten()


class Conv(nn.Module):
    """A convolution's published parameters, and the packed weights of them that it runs with.

    weight [N, C, *taps] with 2 or 3 taps, bias [N]. `carries` frames of its input are remembered
    between calls (0: no slot). `reads`: channels of its input, those beyond C are zeros, which fast
    copies need as filling.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        taps: tuple[int, ...],
        carries: int = 0,
        stride: tuple[int, int, int] = (1, 1, 1),
        reads: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, *taps))
        self.bias = nn.Parameter(torch.empty(channels_out))
        self.carries, self.stride, self.slot = carries, stride, -1
        self.reads = channels_in if reads is None else reads
        self.form: Form | Literal["auto"] = "auto"
        self._packed: PackedKernel | None = None
        self._packed_from: tuple[object, ...] = (None,)

    def over(self, padded: Tensor) -> Tensor:
        """The convolution of a window, without bias."""
        # tensors made in inference mode count no versions, and cannot change outside it
        version = 0 if self.weight.is_inference() else self.weight._version
        key = (self.weight.data_ptr(), version, self.weight.dtype, self.form)
        # the tensor itself, too: another may come to lie where one that was freed had lain
        of, *before = self._packed_from
        if self._packed is None or of is not self.weight or before != [*key]:
            weight = self._kernel()
            form = best_form(weight, stride=self.stride) if self.form == "auto" else self.form
            self._packed = pack(weight, form=form, stride=self.stride)
            self._packed_from = (self.weight, *key)
        return convolve(padded, self._packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Conv:
        # a move to another device must not leave the packed weights behind
        self._packed = None
        return super()._apply(fn, recurse)

    def _kernel(self) -> Tensor:
        weight = self.weight if self.weight.ndim == 5 else self.weight[:, :, None]
        filling = self.reads - weight.shape[1]
        return F.pad(weight, (0, 0, 0, 0, 0, 0, 0, filling)) if filling else weight

    def pointwise(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        """A convolution of one tap as a product over channels of [..., C]."""
        # a plan of kernels to compile: torch would import its decompositions, two seconds of a cold
        # start
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.weight.shape[0])
        return F.linear(x, self.weight.flatten(1), self.bias if with_bias else None)


class NearestThenConv(Conv):
    """Doubling, then a 3x3 convolution, as one 2x2 of the small image (`fold_nearest`)."""

    def _kernel(self) -> Tensor:
        return fold_nearest(self.weight)


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3x3, twice, plus the input, through a 1x1x1 where the channels change."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(channels_in),
                "2": Conv(channels_in, channels_out, taps=(3, 3, 3), carries=2),
                "3": RMSNorm(channels_out),
                "6": Conv(channels_out, channels_out, taps=(3, 3, 3), carries=2),
            }
        )
        if channels_in != channels_out:
            self.shortcut = Conv(channels_in, channels_out, taps=(1, 1, 1))

    def forward(self, features: Features, state: StreamState) -> Features:
        """Features of the same frames."""
        first, second = part(self.residual, "2", Conv), part(self.residual, "6", Conv)
        seen = window(
            features,
            gamma=part(self.residual, "0", RMSNorm).flat(),
            norm="rms_silu",
            carried=state.frames(first),
            border=EDGE,
            keep=True,
        )
        value, entered = first.over(seen.padded), seen.kept
        assert entered is not None  # keep
        # the window is as large as the features: give it back before the next one is made
        del features, seen
        value = window(
            Features(value, first.bias),
            gamma=part(self.residual, "3", RMSNorm).flat(),
            norm="rms_silu",
            carried=state.frames(second),
            border=EDGE,
        ).padded
        shortcut = self.shortcut.pointwise(entered) if hasattr(self, "shortcut") else entered
        return Features(second.over(value), second.bias, shortcut)


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of each frame, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = Conv(channels, 3 * channels, taps=(1, 1))
        self.proj = Conv(channels, channels, taps=(1, 1))

    def forward(self, features: Features, state: StreamState) -> Features:
        """Features of the same frames; nothing is carried."""
        seen = window(features, gamma=self.norm.flat(), norm="rms", keep=True)
        b, t, h, w, c = seen.padded.shape
        qkv = self.to_qkv.pointwise(seen.padded).view(b * t, 1, h * w, 3, c)
        q, k, v = qkv.unbind(dim=3)
        # on meta as in `pointwise`
        attended = q.new_empty(q.shape) if q.is_meta else F.scaled_dot_product_attention(q, k, v)
        out = attended.reshape(b, t, h, w, c)
        return Features(self.proj.pointwise(out, with_bias=False), self.proj.bias, seen.kept)


class Resample(nn.Module):
    """Halve or double the image, and in "*3d" the frames but for the first of a video."""

    def __init__(self, channels: int, *, kind: Resampling) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("up2d", "up3d"):
            self.resample = nn.ModuleDict(
                {"1": NearestThenConv(channels, channels // 2, taps=(3, 3))}
            )
        else:
            self.resample = nn.ModuleDict(
                {"1": Conv(channels, channels, taps=(3, 3), stride=(1, 2, 2))}
            )
        if kind == "up3d":
            self.time_conv = Conv(channels, 2 * channels, taps=(3, 1, 1), carries=2)
        if kind == "down3d":
            self.time_conv = Conv(channels, channels, taps=(3, 1, 1), carries=1, stride=(2, 1, 1))

    def forward(self, features: Features, state: StreamState) -> Features:
        """Features of half or twice the size, and T / 2 or 2 T behind the first frame."""
        conv = part(self.resample, "1", Conv)
        if self.kind in ("up2d", "up3d"):
            if self.kind == "up3d" and state.started:
                time = self.time_conv
                value = time.over(window(features, carried=state.frames(time)).padded)
                features = Features(value, time.bias, layout="frame_pairs")
            return Features(
                conv.over(window(features, border=EDGE).padded), conv.bias, layout="pixel_quads"
            )
        small = Features(conv.over(window(features, border=(0, 1)).padded), conv.bias)
        if self.kind == "down2d":
            return small
        time = self.time_conv
        seen = window(small, carried=state.frames(time)).padded
        if state.started:
            return Features(time.over(seen), time.bias)
        # nothing precedes the first frame of a video: it passes unfolded and is remembered
        return Features(seen[:, time.carries :].contiguous())


def number_slots(
    root: nn.Module, order: Iterator[nn.Module], *, height: int = 1, width: int = 1
) -> list[Slot]:
    """Number the convolutions of `order` that carry frames, and list their slots.

    `order`: the blocks of `root` as they run. Slots have rows and columns per latent cell.
    """
    slots: list[Slot] = []
    scale = (height, width)
    for block in order:
        for conv in (m for m in block.modules() if isinstance(m, Conv) and m.carries):
            after = isinstance(block, Resample) and block.kind == "down3d"
            size = (scale[0] // 2, scale[1] // 2) if after else scale
            conv.slot = len(slots)
            slots.append(
                Slot(frames=conv.carries, rows=size[0], columns=size[1], channels=conv.reads)
            )
        if isinstance(block, Resample):
            up = block.kind in ("up2d", "up3d")
            scale = (scale[0] * 2, scale[1] * 2) if up else (scale[0] // 2, scale[1] // 2)
    unnumbered = [
        name for name, m in root.named_modules() if isinstance(m, Conv) and m.carries and m.slot < 0
    ]
    if unnumbered:
        raise ValueError(
            "convolutions that carry frames are missing from the order of the forward pass:"
            f" {unnumbered}"
        )
    return slots
