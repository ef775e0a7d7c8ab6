"""The tiny decoder as a `LatentCodec`, for previews, streamed as Wan's own decoder is.

It reads whitened latents, without statistics. Pixels come in [0, 1] out of the network, in [-1, 1]
out of this codec.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.encoders.network_codec import NetworkCodec
from rcm.encoders.taehv_net import TinyConfig, TinyDecoder
from rcm.encoders.wan_vae_stream import LatentStatistics, require_latents
from rcm.kernels.precompile import Compiled
from rcm.storage.state_dicts import check_keys, shapes_of
from rcm.storage.weight_files import open_container

PUBLISHED_AT = "taew2_1.pth is published at https://github.com/madebyollin/taehv"


class TinyDecoderCodec(NetworkCodec):
    """A `LatentCodec` that only decodes, in the dtype of its weights; bfloat16 is the fast one."""

    name = "tiny_decoder"

    def __init__(self, net: TinyDecoder, *, path: str | Path | None = None) -> None:
        zeros = torch.zeros(net.config.latent_channels, dtype=torch.float64)
        as_they_are = LatentStatistics(zeros, zeros + 1)
        net._apply(lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x)
        super().__init__(net, as_they_are, path=path)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> TinyDecoderCodec:
        """The codec with the weights of a .pth or .safetensors file; strict (`load_weights`)."""
        with torch.device("meta"):
            net = TinyDecoder()
        load_weights(net, path, device=device, dtype=dtype)
        return cls(net, path=path)

    @classmethod
    def random(
        cls,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        config: TinyConfig | None = None,
    ) -> TinyDecoderCodec:
        """Random weights, drawn in float32 on the CPU: for speed tests, its pictures are noise."""
        net, generator = TinyDecoder(config), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                size = 0.1 if name.endswith("bias") else parameter[0].numel() ** -0.5
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        return cls(net.to(device, dtype))

    def encode(self, video: Tensor) -> Tensor:
        """Refuses: the network was trained on latents of Wan's own encoder."""
        raise ConfigError(
            "the tiny decoder does not encode; encode with Wan's autoencoder (--vae_path), or leave"
            " --tiny_decoder out"
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of whitened latents [B, 16, T, h, w], in their dtype.

        One latent frame at a time: the result is that of any split into chunks, bit for bit.
        """
        require_latents(latents, channels=self.latent_channels)
        return self.stream().decode_chunk(latents)

    def warm_up(
        self, size: tuple[int, int], *, batch: int = 1, frames_per_step: int = 1
    ) -> Compiled:
        """Nothing: the network has no kernels of its own to compile."""
        return Compiled()


def load_weights(
    net: TinyDecoder, path: str | Path, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Fill `net` (on meta or not) from a published file, cast to `dtype` on `device`.

    Everything is checked and read first: `CheckpointError` for a bad file, or for tensors (of the
    encoder in it, too) that are missing, extra or misshapen; `net` is then unchanged. If the file
    grows more frames than the network, the last ones are taken, as their author does.
    """
    decoder = shapes_of(net.state_dict())
    file = open_container(path, hint=f"{PUBLISHED_AT}: name its place with --tiny_decoder")
    file.require_tensors_only()
    shapes = shapes_of(file)
    encoder = (
        encoder_shapes(net.config) if any(name.startswith("encoder.") for name in shapes) else {}
    )
    rows = {
        name: decoder[name][0]
        for name in decoder
        if _grows_more(shapes.get(name, ()), decoder[name])
    }
    fitting = {
        name: (rows.get(name, shape[0]), *shape[1:]) if shape else shape
        for name, shape in shapes.items()
    }
    check_keys(
        str(file.path),
        shapes=fitting,
        expected={**encoder, **decoder},
        network="the tiny decoder for Wan2.1",
    )
    file.require_floats(decoder)
    # copies: a mapped view would change with the file
    kept = {
        name: file[name][-decoder[name][0] :].to(device=device, dtype=dtype, copy=True)
        for name in decoder
    }
    net.load_state_dict(kept, strict=True, assign=True)


def _grows_more(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a product over channels makes several times the frames wanted of it."""
    pointwise = len(found) == len(wanted) == 4 and found[1:] == wanted[1:] and wanted[2:] == (1, 1)
    return pointwise and found[0] > wanted[0] and found[0] % wanted[0] == 0


def encoder_shapes(config: TinyConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of the encoder in a published file: 3 levels of 64 channels, 2 halve time."""
    width = 64
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.0.weight": (width, 3, 3, 3),
        "encoder.0.bias": (width,),
    }
    place = 2
    for frames in (2, 2, 1):
        shapes[f"encoder.{place}.conv.weight"] = (width, frames * width, 1, 1)
        shapes[f"encoder.{place + 1}.weight"] = (width, width, 3, 3)
        for block in range(place + 2, place + 5):
            for conv, read in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"encoder.{block}.conv.{conv}.weight"] = (width, read, 3, 3)
                shapes[f"encoder.{block}.conv.{conv}.bias"] = (width,)
        place += 5
    shapes[f"encoder.{place}.weight"] = (config.latent_channels, width, 3, 3)
    shapes[f"encoder.{place}.bias"] = (config.latent_channels,)
    return shapes
