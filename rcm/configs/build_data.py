"""Data of a run: the loader of this data rank, and the negative embedding."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.configs.network import wan_config
from rcm.configs.pieces import encode_once, text_encoder, toy_codec, toy_text, toy_world
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_common import CommonModelConfig
from rcm.core.errors import ConfigError
from rcm.data.batch import LatentBatch
from rcm.data.fake import FakeLatents
from rcm.data.latents import LatentShards
from rcm.data.loader import Loader, Source
from rcm.data.prompts import Prompts, read_prompts
from rcm.data.shard_writer import MANIFEST, read_manifest
from rcm.nets.condition import Condition
from rcm.nets.wan.config import WanConfig
from rcm.parallel.agree import together
from rcm.parallel.mesh import ParallelDims
from rcm.storage.pickle_file import read_tensor
from rcm.worlds.toy_latents import ToyLatents
from rcm.worlds.toy_text import vocabulary

LATENT_CACHE_BYTES = 1 << 30
"""Decoded samples in memory: all of a toy data set, few of a real one (480p: 12 MB each)."""


def latent_shape(model: CommonModelConfig) -> tuple[int, int, int, int]:
    """[C, T, H, W] of one sample."""
    return (model.state_ch, model.state_t, *model.latent_size())


def build_loader(
    run: TrainConfig, *, dims: ParallelDims, device: torch.device | str = "cpu"
) -> Loader:
    """The loader of this data rank, equal on the ranks of one sample; `device` encodes prompts."""
    data = run.dataloader_train
    return Loader(
        _source(run, device=device),
        batch_size=data.batch_size,
        seed=data.shuffle_seed,
        data_rank=dims.data_rank,
        data_world=dims.num_data_ranks,
        prefetch=data.prefetch_factor * data.num_workers,
        threads=max(1, data.num_workers),
        accept_changed=run.checkpoint.accept_changed_data,
    )


def _source(run: TrainConfig, *, device: torch.device | str) -> Source:
    data, model = run.dataloader_train, run.model.config
    net = wan_config(model.net)
    text_shape = (net.text_len, net.text_dim)
    channels, frames, height, width = latent_shape(model)
    match data.kind:
        case "fake":
            states = 0
            if isinstance(model, CausalConfig) and model.learns_trajectories:
                states = len(model.kd_timesteps) + 1
            return FakeLatents(
                num=max(data.num_videos, data.batch_size),
                latent_shape=latent_shape(model),
                text_shape=text_shape,
                trajectory_states=states,
            )
        case "toy":
            codec = toy_codec(model)
            return ToyLatents(
                toy_world(model),
                codec,
                toy_text(model),
                num=data.num_videos,
                seed=data.shuffle_seed,
            )
        case "latents":
            shards = LatentShards(
                data.tar_path_pattern,
                num_latent_frames=frames,
                latent_channels=channels,
                latent_size=(height, width),
                text_shape=text_shape,
                cache_bytes=LATENT_CACHE_BYTES,
            )
            if isinstance(model, CausalConfig) and model.learns_trajectories:
                _check_trajectories(model, {shard.path.parent for shard in shards.shards})
            return shards
        case "prompts":
            encoder = text_encoder(model, device=device)
            turn = threading.Lock()  # an encoder serves one thread at a time

            def encode(words: Sequence[str]) -> Tensor:
                with turn:
                    return encoder.encode(words).cpu()

            prompts = Prompts(read_prompts(data.tar_path_pattern), encode=encode)
            return _PromptedShapes(prompts, latent_shape(model))
    raise ConfigError(f"dataloader_train.kind={data.kind!r} has no source")


def known_words(model: CommonModelConfig, source: Source) -> tuple[str, ...]:
    """Vocabulary of the captions, for a text encoder that has none of its own: the toy one."""
    captioned: Any = source
    if model.text_encoder_class != "toy" or isinstance(source, FakeLatents):
        return ()
    return vocabulary(captioned.captions())


def _check_trajectories(model: CausalConfig, folders: set[Path]) -> None:
    """Trajectories must be made for this run, which their number of states does not tell."""
    mine: dict[str, Any] = {
        "training_type": model.training_type,
        "kd_timesteps": list(model.kd_timesteps),
    }
    if model.training_type == "tf_kd" and model.pattern is not None:
        mine["pattern"] = model.pattern.name
    for folder in sorted(folders):
        stored = read_manifest(folder)
        for key in mine:
            if key in stored and stored[key] != mine[key]:
                knob = "first_chunk_t / chunk_t" if key == "pattern" else key
                raise ConfigError(
                    f"the trajectories in {folder} were built for {key}={stored[key]} (its"
                    f" {MANIFEST}), the run has {key}={mine[key]}; change model.config.{knob} or"
                    " dataloader_train.tar_path_pattern"
                )


class _PromptedShapes:
    """Prompts with zeros for latents, of which on-policy training reads the shape alone."""

    def __init__(self, prompts: Prompts, shape: tuple[int, int, int, int]) -> None:
        self._prompts, self._shape = prompts, shape

    def __len__(self) -> int:
        return len(self._prompts)

    def fingerprint(self) -> str:
        return self._prompts.fingerprint()

    def captions(self) -> Iterator[str]:
        return self._prompts.captions()

    def fetch(self, indices: Sequence[int]) -> LatentBatch:
        batch = self._prompts.fetch(indices)
        return LatentBatch(
            torch.zeros(len(indices), *self._shape),
            batch.text,
            batch.prompts,
            [str(i) for i in indices],
        )


def negative_condition(run: TrainConfig, *, device: torch.device) -> Condition:
    """The unconditional branch of a guided teacher, batch 1: the embedding stored at
    `neg_embed_path`, or the encoder's negative prompt. Collective.
    """
    model = run.model.config
    if model.neg_embed_path:
        text = together(lambda: _stored_embedding(model.neg_embed_path, wan_config(model.net)))
    elif run.dataloader_train.kind == "fake":
        net = wan_config(model.net)
        text = torch.zeros(1, net.text_len, net.text_dim)
    else:
        text = encode_once(model, lambda encoder: [encoder.negative_prompt], device=device)
    return Condition(text.to(device))


def _stored_embedding(path: str, net: WanConfig) -> Tensor:
    stored = read_tensor(Path(path), name=f"model.config.neg_embed_path={path}")
    if (
        not stored.is_floating_point()
        or stored.ndim not in (2, 3)
        or stored.shape[:-2] not in ((), (1,))
        or not stored.numel()
    ):
        told = f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"
        raise ConfigError(
            f"model.config.neg_embed_path={path} must hold a floating-point tensor [L, E] or [1, L,"
            f" E], it holds {told}"
        )
    if stored.shape[-2] > net.text_len or stored.shape[-1] != net.text_dim:
        raise ConfigError(
            f"model.config.neg_embed_path={path} has shape {list(stored.shape)}, the network takes"
            f" at most {net.text_len} tokens of width {net.text_dim}; give an embedding of its text"
            " encoder or change model.config.net"
        )
    wide = stored.float()
    if not wide.isfinite().all():
        raise ConfigError(
            f"model.config.neg_embed_path={path} holds NaN or infinite values; encode the negative"
            " prompt again"
        )
    return wide.reshape(1, *stored.shape[-2:])
