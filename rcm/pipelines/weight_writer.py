"""A network written in the form of any family, atomically: a torch pickle, a safetensors file, a
published folder, a DCP directory.

safetensors are written tensor by tensor, so memory holds one at a time; the other containers need
the whole network (memory-mapped if it comes from a torch pickle and keeps its dtype).
docs/reference/wan.md#files.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile, is_file_of, require_expanded, require_folder
from rcm.nets.wan.config import WanConfig
from rcm.nets.wan.convert import FORMS, Format, other_form, other_name
from rcm.nets.wan.published_config import published_settings
from rcm.storage.dcp_folder import reason_of
from rcm.storage.pickle_file import write_pickle
from rcm.storage.safetensors_file import write_safetensors
from rcm.storage.state_dicts import LazyWeights, in_dtype, listed
from rcm.storage.weight_files import INDEX
from rcm.train.describe import FILE_NAME, Description, replacing_described

FOLDER_STEM = "diffusion_pytorch_model"


class OtherForm(LazyWeights):
    """A network (package's own form) under the names, shapes and dtype of another family, read one
    tensor at a time. `dtype` None keeps each tensor's.
    """

    def __init__(
        self, network: LazyWeights, *, form: Format, config: WanConfig, dtype: torch.dtype | None
    ) -> None:
        self.network, self.form, self.patch, self.dtype = network, form, config.patch, dtype
        self.names = {other_name(name, form=form): name for name in network}
        self.headers = {
            key: self._as(name, network.headers[name]) for key, name in self.names.items()
        }

    def __getitem__(self, key: str) -> Tensor:
        return self._as(self.names[key], self.network[self.names[key]])

    def _as(self, name: str, tensor: Tensor) -> Tensor:
        # a merged update comes in float32, whatever the dtype that the network keeps
        dtype = self.dtype or self.network.headers[name].dtype
        return in_dtype(name, other_form(name, tensor, form=self.form, patch=self.patch), dtype)


def save_network(
    path: str | Path,
    network: LazyWeights,
    *,
    form: Format,
    config: WanConfig,
    description: Description,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `network` (package's own form) to `path` and return it.

    The suffix chooses the container: .safetensors; .pt or .pth; .dcp, a directory of
    torch.distributed.checkpoint; none, a folder of safetensors (sharded above `max_shard_bytes`)
    with the config.json of the form, where it has one. The description goes beside a file as
    <name>.json (and into a safetensors' metadata), into a folder as rcm.json. Raises `ConfigError`,
    before anything is written, for another suffix, a form that the container cannot hold, or a path
    that exists while `overwrite` is False, a folder with other files, what `network` is read from.
    Whatever fails later leaves `path` as it was.
    """
    target = Path(path)
    _check_target(target, form=form, max_shard_bytes=max_shard_bytes)
    check_free(
        target,
        overwrite=overwrite,
        ours=lambda name: name.startswith(FOLDER_STEM) or name.endswith(".distcp"),
        read=network.sources,
    )
    if target.suffix in (".safetensors", ".pt", ".pth"):
        OutputFile.claim(target)
    elif not target.exists():
        require_folder(target, f"{target}")
    weights = OtherForm(network, form=form, config=config, dtype=dtype)
    with replacing_described(target, description) as partial:
        _write(
            partial,
            weights,
            kind=target.suffix,
            config=config,
            description=description,
            max_shard_bytes=max_shard_bytes,
        )
    return target


def _write(
    path: Path,
    weights: OtherForm,
    *,
    kind: str,
    config: WanConfig,
    description: Description,
    max_shard_bytes: int | None,
) -> None:
    """The container of suffix `kind` at `path`."""
    if kind == ".safetensors":
        write_safetensors(
            path,
            weights.headers,
            weights.__getitem__,
            metadata={"format": "pt", "rcm": description.to_json()},
        )
    elif kind in (".pt", ".pth"):
        write_pickle(path, _contained(weights, copy=str(description.extra.get("weights"))))
    elif kind == ".dcp":
        with warnings.catch_warnings():
            # one process is what is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.save(
                    _whole(weights),
                    storage_writer=FileSystemWriter(str(path), single_file_per_rank=True),
                    no_dist=True,
                )
            except CheckpointException as error:
                raise reason_of(error, path=path) from error
        description.write(path / FILE_NAME)
    else:
        _write_folder(
            path, weights, config=config, description=description, max_shard_bytes=max_shard_bytes
        )


def _write_folder(
    folder: Path,
    weights: OtherForm,
    *,
    config: WanConfig,
    description: Description,
    max_shard_bytes: int | None,
) -> None:
    folder.mkdir()
    shards = _shards(weights.headers, max_shard_bytes)
    where: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        which = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        name = f"{FOLDER_STEM}{which}.safetensors"
        where |= dict.fromkeys(keys, name)
        write_safetensors(
            folder / name,
            {key: weights.headers[key] for key in keys},
            weights.__getitem__,
            metadata={"format": "pt"},
        )
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(header.nbytes for header in weights.headers.values())},
            "weight_map": where,
        }
        (folder / f"{FOLDER_STEM}.safetensors{INDEX}").write_text(json.dumps(index, indent=2))
    settings = published_settings(config, form=weights.form)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings, indent=2))
    description.write(folder / FILE_NAME)


def _shards(headers: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    """Keys in order, cut where a shard would grow beyond `limit` bytes; a tensor larger than that
    stands alone.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for key, header in headers.items():
        if limit is not None and shards[-1] and filled + header.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += header.nbytes
    return shards


def _contained(weights: OtherForm, *, copy: str) -> Mapping[str, object]:
    """The dict that torch.save writes: a family with containers gets the one of this copy."""
    entry = {"ema": "generator_ema", "fake_score": "critic"}.get(
        copy, FORMS[weights.form].container
    )
    return {entry: _whole(weights)} if FORMS[weights.form].container else _whole(weights)


def _whole(weights: LazyWeights) -> dict[str, Tensor]:
    """Every tensor with a storage of its own: torch.save writes whole storages, and views into a
    mapped file would repeat it.
    """
    tensors = {key: weights[key].cpu() for key in weights}
    return {
        key: t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
        for key, t in tensors.items()
    }


def _check_target(target: Path, *, form: Format, max_shard_bytes: int | None) -> None:
    if form not in FORMS:
        raise ConfigError(f"unknown form {form!r}; choose --to from {', '.join(FORMS)}")
    if target.suffix not in (".safetensors", ".pt", ".pth", ".dcp", ""):
        raise ConfigError(
            f"cannot tell what {target} should be: end it in .safetensors, .pt, .pth or .dcp, or"
            " give a folder without suffix"
        )
    if FORMS[form].container and target.suffix not in (".pt", ".pth"):
        raise ConfigError(
            f"the form {form} nests state dicts, which only .pt and .pth hold; {target} is none"
        )
    if max_shard_bytes is not None and (target.suffix or max_shard_bytes < 1):
        raise ConfigError(
            f"--max_shard_size is a positive size for a folder of shards; {target} with"
            f" {max_shard_bytes} bytes is none"
        )


def check_free(
    target: Path, *, overwrite: bool, ours: Callable[[str], bool], read: Iterable[Path]
) -> None:
    """Raise `ConfigError` for a target that is, holds or is part of what is `read`, that is in a
    folder called ~, that exists while `overwrite` is False, and for a folder with files that are
    not `ours` (nor what every folder of weights has).
    """
    require_expanded(target, f"{target}")
    here = Path(os.path.realpath(target))  # which takes links that lead in a circle
    for source in read:
        there = Path(os.path.realpath(source))
        if (
            is_file_of(target, source)
            or here in there.parents
            or (here.exists() and there in here.parents)
        ):
            raise ConfigError(
                f"{target} is read for this ({source}) and would be replaced; choose another target"
            )
    if target.exists() and not overwrite:
        raise ConfigError(
            f"{target} exists; pass --overwrite to replace it, or choose another target"
        )
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    others = [
        name
        for name in names
        if name not in (FILE_NAME, "config.json", ".metadata") and not ours(name)
    ]
    if others:
        raise ConfigError(
            f"{target} holds other files ({listed(others, most=3)}), which would be lost; choose"
            " another target"
        )
