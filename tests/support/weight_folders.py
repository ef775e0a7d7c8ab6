"""A small network written in every container and form that loaders meet."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.convert import from_wan
from rcm.nets.wan.published_config import published_settings
from tests.support.tiny_nets import tiny_config, tiny_net

State = dict[str, Tensor]


def small_config() -> WanConfig:
    """One head of 128, so that sizes can be told from tensors alone."""
    return tiny_config(dim=128, num_heads=1, ffn_dim=32, text_len=512, image_dim=1280)


def small_state(*, seed: int = 0, **changes) -> State:
    """Float32 weights of it; keyword changes as fields of `WanConfig`."""
    return dict(tiny_net(seed=seed, dtype=torch.float32, dim=128, num_heads=1, ffn_dim=32, text_len=512, **changes).state_dict())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def own(state: State) -> State:
    """Copies that share no storage, as safetensors wants them."""
    return {key: value.clone().contiguous() for key, value in state.items()}


def write_shards(folder: Path, state: State, *, shards: int = 3, settings: dict | None = None) -> Path:
    """Sharded safetensors with their index, and config.json if `settings`."""
    folder.mkdir(parents=True)
    names = [f"diffusion_pytorch_model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    where = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file(own({key: value for key, value in state.items() if where[key] == name}), folder / name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    if settings:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_dcp(folder: Path, state: dict) -> Path:
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def _pickle(path: Path, value: object, **options) -> Path:
    torch.save(value, path, **options)
    return path


def _flat(path: Path, state: State, lead: str = "") -> Path:
    save_file(own(prefixed(from_wan(state, form="wan"), lead)), path)
    return path


def _wrapped(state: State) -> State:
    """The names that FSDP, activation checkpointing and compile leave in the averaged copy of the
    Self-Forcing trainer.
    """
    plain = from_wan(state, form="wan")
    return {
        "model._fsdp_wrapped_module." + key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._orig_mod."): value
        for key, value in plain.items()
    }


def _rcm_job(folder: Path, state: State) -> Path:
    """A job folder of rcm: three networks in one DCP directory."""
    other = {key: value + 1 for key, value in state.items()}
    three = {**prefixed(state, "net_ema."), **prefixed(other, "net."), **prefixed({k: v + 2 for k, v in state.items()}, "net_fake_score.")}
    write_dcp(folder / "checkpoints" / "iter_000000200" / "model", three)
    (folder / "checkpoints" / "latest_checkpoint.txt").write_text("iter_000000200\n")
    return folder


FAMILIES: dict[str, Callable[[Path, State], Path]] = {
    "original Wan .safetensors": lambda d, s: _flat(d / "diffusion_pytorch_model.safetensors", s),
    "original Wan shards": lambda d, s: write_shards(
        d / "wan", from_wan(s, form="wan"), settings=published_settings(small_config(), form="wan")
    ),
    "Wan2.2 expert": lambda d, s: write_shards(d / "A14B" / "low_noise_model", from_wan(s, form="wan")),
    "rcm .pth": lambda d, s: _pickle(d / "teacher.pth", prefixed(s, "net.")),
    "rcm .pt of the old format": lambda d, s: _pickle(d / "old.pt", prefixed(s, "net."), _use_new_zipfile_serialization=False),
    "rcm .dcp": lambda d, s: write_dcp(d / "teacher.dcp", prefixed(s, "net.")),
    "rcm job": lambda d, s: _rcm_job(d / "job", s),
    "Self-Forcing": lambda d, s: _pickle(d / "dmd.pt", {"generator_ema": prefixed(from_wan(s, form="wan"), "model.")}),
    "Self-Forcing trainer": lambda d, s: _pickle(
        d / "model.pt",
        {"generator": from_wan({k: v + 1 for k, v in s.items()}, form="self_forcing"), "generator_ema": _wrapped(s), "step": 3},
    ),
    "CausVid": lambda d, s: _pickle(
        d / "causvid.pt",
        {"generator": from_wan(s, form="self_forcing"), "critic": from_wan({k: v + 1 for k, v in s.items()}, form="self_forcing")},
    ),
    "LongLive": lambda d, s: _pickle(
        d / "longlive_base.pt",
        {"generator": from_wan(s, form="self_forcing"), "generator_optimizer": {"state": {0: {"step": torch.ones(1)}}}, "step": 7},
    ),
    "ComfyUI": lambda d, s: _flat(d / "comfy.safetensors", s, "model.diffusion_model."),
    "diffusers transformer": lambda d, s: write_shards(
        d / "transformer", from_wan(s, form="diffusers"), settings=published_settings(small_config(), form="diffusers")
    ),
    "diffusers pipeline": lambda d, s: write_shards(d / "pipe" / "transformer", from_wan(s, form="diffusers")).parent,
    "torch_to_dcp of a nested file": lambda d, s: write_dcp(d / "nested", {"generator": from_wan(s, form="self_forcing"), "step": 3}),
}
"""What a user may have -> writes it below a folder and returns the path to give; averaged weights
(or the only ones) are the state's.
"""
