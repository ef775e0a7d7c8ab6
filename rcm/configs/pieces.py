"""Codec and text encoder of a run: the toy world's, or Wan's from their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rcm.configs.network import wan_config
from rcm.configs.schema_common import CommonModelConfig
from rcm.core.errors import ConfigError
from rcm.encoders.codec import LatentCodec
from rcm.encoders.text_protocol import TextEncoder
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.encoders.umt5_weights import UMT5_FILE
from rcm.encoders.wan_vae import WanVAECodec
from rcm.parallel.agree import on_first, shared
from rcm.worlds.toy_codec import ToyCodec
from rcm.worlds.toy_text import ToyTextEncoder
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig


def described_pieces(
    model: CommonModelConfig, *, words: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Codec and text encoder as checkpoints describe them; `words` of the captions."""
    if model.tokenizer.name == "toy":
        codec = {"name": "toy", **asdict(toy_codec(model))}
    else:
        codec = {"name": "wan_vae", "path": model.tokenizer.vae_pth}
    if model.text_encoder_class == "toy":
        return codec, {"name": "toy", **asdict(toy_text(model)), "words": list(words)}
    return codec, {"name": "umt5", "path": model.text_encoder_path or UMT5_FILE}


def codec_of_run(model: CommonModelConfig, *, device: torch.device | str) -> LatentCodec:
    """The codec of the latents; `CheckpointError` if Wan's VAE is not where it should be."""
    if model.tokenizer.name == "toy":
        return toy_codec(model)
    return WanVAECodec.from_file(model.tokenizer.vae_pth, device=device)


def text_encoder(model: CommonModelConfig, *, device: torch.device | str) -> TextEncoder:
    """The encoder of prompts; umT5 is read at its first prompt, and stays on `device`."""
    if model.text_encoder_class == "toy":
        return toy_text(model)
    weights, cache = model.text_encoder_path or UMT5_FILE, model.text_cache or None
    return UMT5TextEncoder.from_files(
        weights, device=device, cache=cache, text_len=wan_config(model.net).text_len
    )


def encode_once(
    model: CommonModelConfig,
    prompts: Callable[[TextEncoder], Sequence[str]],
    *,
    device: torch.device | str,
) -> Tensor:
    """Embeddings of prompts, float32 on the CPU; rank 0 encodes, then frees. Collective."""

    def encode() -> Tensor:
        encoder = text_encoder(model, device=device)
        rows = encoder.encode(prompts(encoder)).float().cpu()
        if isinstance(encoder, UMT5TextEncoder):
            encoder.unload()
        return rows

    return shared(on_first(encode))


def toy_codec(model: CommonModelConfig) -> ToyCodec:
    """The toy codec of `tokenizer`; `ConfigError` unless its channels are `state_ch`."""
    t = model.tokenizer
    codec = ToyCodec(t.temporal_stride, t.spatial_stride, t.gain, t.boost, t.centre)
    if codec.latent_channels != model.state_ch:
        raise ConfigError(
            f"the toy codec with strides {t.temporal_stride} x {t.spatial_stride} has"
            f" {codec.latent_channels} channels, model.config.state_ch={model.state_ch}; change"
            " model.config.tokenizer or state_ch"
        )
    return codec


def toy_text(model: CommonModelConfig) -> ToyTextEncoder:
    """The toy text encoder of the student's text size."""
    net = wan_config(model.net)
    return ToyTextEncoder(text_len=net.text_len, text_dim=net.text_dim)


def toy_world(model: CommonModelConfig) -> ToyWorld:
    """The toy world at the pixel size that the latents decode to."""
    codec = toy_codec(model)
    height, width = (size * codec.spatial_stride for size in model.latent_size())
    return ToyWorld(
        ToyWorldConfig.at_size(height, width, num_frames=codec.frames_for(model.state_t))
    )
