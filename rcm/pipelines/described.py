"""What a checkpoint's self-description stands for: network sizes, precision, codec, text encoder.
Each is checked, none is guessed.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.codec import LatentCodec
from rcm.encoders.text_protocol import TextEncoder
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.encoders.umt5_weights import UMT5_FILE
from rcm.encoders.wan_vae import WanVAECodec
from rcm.encoders.wan_vae_weights import WAN_VAE_FILE
from rcm.nets.wan.config import WanConfig
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.rollout.recipe import SamplingRecipe
from rcm.storage.weight_files import CONFIGS, WeightFile, open_container
from rcm.train.describe import Description
from rcm.train.export import describe, find_model_directory
from rcm.worlds.toy_codec import ToyCodec
from rcm.worlds.toy_text import ToyTextEncoder

TOY_PROMPT = "a red square moving left"
"""A sentence of the default toy world."""


def description_at(path: Path) -> Description:
    """Self-description of a checkpoint folder or file, beside it or inside a safetensors file;
    `CheckpointError` without one.
    """
    found = describe(path)
    if found is None and path.suffix == ".safetensors" and path.is_file():
        found = description_of(open_container(path))
    if found is None:
        model = None if path.is_file() else find_model_directory(path)
        if model is None and not path.is_file():
            raise CheckpointError(
                f"{path} is not a DCP checkpoint, nor the folder of a job that has written one"
                " (checkpoints/latest_checkpoint.txt in it); name such a folder, an iter_* folder,"
                " or an exported file"
            )
        beside = f"{path}.json" if model is None else f"rcm.json in {model.parent}"
        raise CheckpointError(
            f"{path} does not describe itself: there is no {beside}; "
            "sampling needs the file that training and scripts.dcp_to_pth write there"
        )
    return found


def description_of(file: WeightFile) -> Description | None:
    """The self-description beside the weights or inside a safetensors file; None without one."""
    found = describe(file.path)
    # a published folder describes itself as a whole
    if found is None and file.path.stem in CONFIGS:
        found = describe(file.path.parent)
    if found is None and "rcm" in file.metadata:
        found = Description.from_json(file.metadata["rcm"], source=f"the metadata of {file.path}")
    return found


def stream_command(path: str | Path, description: Description) -> str | None:
    """The line that streams from this checkpoint, ready to be typed; None where it does not say how
    it is sampled.
    """
    extra = description.extra
    if not (extra.get("recipe") or extra.get("sampler")):
        return None
    text = extra.get("text") or {}
    prompt = "a cat on a skateboard"
    if text.get("name") == "toy":
        words = tuple(text.get("words") or TOY_PROMPT.split())
        prompt = (
            TOY_PROMPT
            if set(TOY_PROMPT.split()) <= set(words)
            else " ".join(words[: text.get("text_len", 8) - 1][:4])
        )
    return f"rcm stream --ckpt {typed(path)} --prompt {typed(prompt)}"


def typed(word: str | Path) -> str:
    """As a shell takes it: advice works as printed, whatever a folder is called."""
    return shlex.quote(str(word))


def network_of(description: Description, path: Path) -> WanConfig:
    """The described network's sizes; `CheckpointError` for unknown or impossible ones."""
    fields = dict(description.network)
    unknown = sorted(set(fields) - set(WanConfig.__dataclass_fields__))
    if unknown:
        raise CheckpointError(
            f"{path} describes a network with unknown sizes {', '.join(unknown)}; a newer version"
            " of rcm wrote it"
        )
    if "patch" in fields:
        fields["patch"] = tuple(fields["patch"])
    try:
        return WanConfig(**fields)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} describes no possible network: {error}") from error


def precision_of(asked: Precision | str | None, described: Mapping[str, str] | None) -> Precision:
    """`asked` (a record or a preset's name), else that of the run with parameters in its compute
    dtype, else fp32.
    """
    if isinstance(asked, str):
        return Precision.preset(asked)
    if asked is not None:
        return asked
    if described is None:
        return Precision.preset("fp32")
    try:
        compute, when = (getattr(torch, described[key]) for key in ("compute", "time"))
    except (KeyError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint describes an unknown precision {dict(described)}"
        ) from error
    return Precision(
        params=compute,
        compute=compute,
        reduce=torch.promote_types(compute, torch.float32),
        time=when,
    )


@dataclass(frozen=True)
class PieceFiles:
    """Where this machine keeps what a checkpoint needs beside its weights. None: where the
    checkpoint says, else the usual place.

    `vae`, `text_encoder`: files of Wan's VAE and umT5; `tokenizer`: folder of umT5's tokenizer;
    `text_cache`: folder for embeddings.
    """

    vae: str | Path | None = None
    text_encoder: str | Path | None = None
    tokenizer: str | Path | None = None
    text_cache: str | Path | None = None


def codec_of(
    described: Mapping[str, Any] | None,
    path: Path,
    *,
    files: PieceFiles = PieceFiles(),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> LatentCodec:
    """The described codec: "toy", or Wan's VAE ("wan_vae"; older: "wan") read from `files`, the
    described path or the usual one.

    Raises `ConfigError` for one that is not part of this version, or files that it does not use;
    `CheckpointError` for an incomplete description, or a file that is missing or damaged.
    """
    name, fields = _named(described, "codec", path)
    if name == "toy":
        _refuse_files({"vae": files.vae}, path, what="the codec 'toy'")
        return _built(ToyCodec, fields, what="codec", path=path)
    if name not in ("wan_vae", "wan"):
        raise ConfigError(
            f"{path} was trained on latents of the codec {name!r}; this version decodes 'toy' and"
            " 'wan_vae'"
        )
    where = files.vae or fields.get("path") or WAN_VAE_FILE
    if not Path(where).exists():
        raise CheckpointError(
            f"{path} was trained on latents of Wan's VAE, and there is no {where}; say where"
            " Wan2.1_VAE.pth is with --vae_path (published in"
            " huggingface.co/Wan-AI/Wan2.1-T2V-1.3B)"
        )
    return WanVAECodec.from_file(where, device=device, dtype=dtype)


def text_of(
    described: Mapping[str, Any] | None,
    path: Path,
    *,
    files: PieceFiles = PieceFiles(),
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """The described text encoder: "toy", or umT5 ("umt5", "umT5"), read at the first prompt; files
    and errors as `codec_of`.
    """
    name, fields = _named(described, "text encoder", path)
    if name == "toy":
        given = {
            "text_encoder": files.text_encoder,
            "tokenizer": files.tokenizer,
            "text_cache": files.text_cache,
        }
        _refuse_files(given, path, what="the text encoder 'toy'")
        return _built(ToyTextEncoder, fields, what="text encoder", path=path)
    if name not in ("umt5", "umT5"):
        raise ConfigError(
            f"{path} was trained on embeddings of {name!r}; this version encodes with 'toy' and"
            " 'umt5'"
        )
    where = files.text_encoder or fields.get("path") or UMT5_FILE
    # the described tokenizer lies beside the described weights, perhaps on another machine
    moved = files.text_encoder is not None
    tokenizer = files.tokenizer or (None if moved else fields.get("tokenizer"))
    return UMT5TextEncoder.from_files(
        where, tokenizer=tokenizer, device=device, cache=files.text_cache
    )


def _refuse_files(given: Mapping[str, str | Path | None], path: Path, *, what: str) -> None:
    flags = {name: "--text_cache" if name == "text_cache" else f"--{name}_path" for name in given}
    named = [f"{name}={x} ({flags[name]})" for name, x in given.items() if x is not None]
    if named:
        raise ConfigError(
            f"{path} was trained with {what}, which reads no file; leave out {', '.join(named)}"
        )


def _named(
    described: Mapping[str, Any] | None, what: str, path: Path
) -> tuple[str, dict[str, Any]]:
    if not described or "name" not in described:
        raise CheckpointError(f"{path} does not say which {what} it was trained with")
    return described["name"], {key: value for key, value in described.items() if key != "name"}


def _built(kind: type, fields: dict[str, Any], *, what: str, path: Path) -> Any:
    try:
        return kind(**fields)
    except TypeError as error:
        raise CheckpointError(
            f"{path} describes a {what} that this version does not know: {error}"
        ) from error


def latent_shape_of(
    stored: Sequence[int] | None,
    config: WanConfig,
    *,
    codec: LatentCodec,
    text: TextEncoder,
    path: Path,
) -> tuple[int, int, int, int]:
    """The described shape of a sample, once network, codec and text encoder are seen to agree."""
    if stored is None or len(stored) != 4:
        raise CheckpointError(f"{path} must describe latent_shape as [C, T, H, W], got {stored}")
    channels, frames, height, width = (int(n) for n in stored)
    config.token_grid(height, width)
    pairs = (
        ("latent channels", channels, "the codec", codec.latent_channels),
        ("latent channels", channels, "the network", config.out_dim),
        ("text width", text.text_dim, "the network", config.text_dim),
    )
    for what, mine, where, theirs in pairs:
        if mine != theirs:
            raise CheckpointError(
                f"{path} contradicts itself: {mine} {what}, but {theirs} in {where}"
            )
    return channels, frames, height, width


def recipes_of(
    extra: Mapping[str, Any], path: Path
) -> tuple[SamplingRecipe | None, WholeVideoRecipe | None]:
    """The described recipe, or the sampler of whole videos. `CheckpointError` for neither, or an
    impossible one.
    """
    recipe, sampler = extra.get("recipe"), extra.get("sampler")
    if recipe is not None:
        return SamplingRecipe.from_dict(dict(recipe)), None
    if sampler is None:
        raise CheckpointError(
            f"{path} does not say how to sample it: its description has neither a recipe nor a"
            " sampler"
        )
    try:
        return None, WholeVideoRecipe.from_dict(sampler)
    except ConfigError as error:
        raise CheckpointError(f"{path} describes an impossible sampler: {error}") from error
