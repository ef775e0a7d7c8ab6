"""One reader for every container of one network's weights: what is inside is known, and the
container verified complete, before a tensor is read.

    .pt / .pth / .bin / .ckpt   torch pickle, memory-mapped (the old format without a zip is read
                                into memory)
    .safetensors                read entry by entry
    *.index.json, or its folder shards
    folder                      the only file of weights in it

Keys are those of the file, nested state dicts joined with dots; whose they are is the caller's
business. docs/reference/wan.md#files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.core.errors import CheckpointError, first_line
from rcm.storage.inside import is_plain_name
from rcm.storage.json_file import read_object
from rcm.storage.pickle_file import read_pickle
from rcm.storage.safetensors_file import read_entry, read_header
from rcm.storage.state_dicts import LazyWeights, listed

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (*PICKLES, ".safetensors")
INDEX = ".index.json"
CONFIGS = {"diffusion_pytorch_model": "config.json", "adapter_model": "adapter_config.json"}
"""Beginning of a published file's name -> the settings beside it. Files with other names may lie in
a folder together.
"""
_SHARD = re.compile(r".+-\d{5}-of-(\d{5})")
PLAIN_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightFile(LazyWeights):
    """All tensors of one file or folder, read one by one.

    `headers` has them as meta tensors; `container` says in words how they are kept; `others` are
    the keys of entries that are no tensors, `unnamed` those of them that hold tensors without a
    name; `metadata` is that of safetensors files; `config` the config.json beside them, None
    without one.
    """

    def __init__(
        self,
        path: Path,
        *,
        container: str,
        headers: Mapping[str, Tensor],
        read: Callable[[str], Tensor],
        others: Iterable[str] = (),
        unnamed: Iterable[str] = (),
        metadata: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.container, self.headers = path, container, headers
        self.sources = (path,)
        self.others, self.unnamed, self._read = tuple(others), tuple(unnamed), read
        self.metadata, self.config = dict(metadata or {}), config

    def __getitem__(self, key: str) -> Tensor:
        """The tensor as stored, on the CPU (of a mapped file a view); `CheckpointError`."""
        if key not in self.headers:
            raise KeyError(key)
        try:
            return self._read(key)
        except CheckpointError:  # of a shard, which has named itself and the tensor
            raise
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path}: {key} cannot be read ({first_line(error)})"
            ) from error

    def require_tensors_only(self) -> None:
        """`CheckpointError` naming entries that are no tensors, for networks in flat dicts."""
        if self.others:
            raise CheckpointError(
                f"{self.path} holds entries that are not tensors: {listed(self.others)}; expected a"
                " flat dict of tensors"
            )

    def require_named(self) -> None:
        """`CheckpointError` naming `unnamed`: what they hold would be left out without a word."""
        if self.unnamed:
            raise CheckpointError(
                f"{self.path} holds tensors without names under {listed(self.unnamed)} (numbered or"
                " listed); expected dicts with words as keys"
            )

    def require_floats(self, keys: Iterable[str]) -> None:
        """`CheckpointError` naming `keys` of quantised weights: nobody applies their scales."""
        odd = [
            f"{key} ({str(dtype).removeprefix('torch.')})"
            for key in keys
            if (dtype := self.headers[key].dtype) not in PLAIN_FLOATS
        ]
        if odd:
            raise CheckpointError(
                f"{self.path} holds weights that are not float64, float32, float16 or bfloat16:"
                f" {listed(odd)}; a quantised file? take the bf16 or fp32 file of the same model"
            )


def open_container(path: str | Path, *, hint: str = "") -> WeightFile:
    """The tensors of one network in any container (see the module), none of them read yet.

    `hint` ends the errors for a path that does not exist and for a folder: where the file is
    published, which flag names it. Raises `CheckpointError` for these, for a shard alone, and for a
    file that is truncated, damaged or of an unknown kind, and a shard that is missing or disagrees
    with its index.
    """
    if not str(path).strip():  # and not this folder
        raise CheckpointError("the path of the weights is empty; name a file or a folder")
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist" + (f"; {hint}" if hint else ""))
    if path.is_dir():
        return _open_folder(path, hint=hint)
    if path.name.endswith(INDEX):
        return _open_shards(path)
    if (shard := _SHARD.fullmatch(path.stem)) and int(shard[1]) > 1:
        raise CheckpointError(
            f"{path} is one of {int(shard[1])} shards of a network; give its folder, with the"
            f" others and their *{INDEX} in it"
        )
    return _open_file(path)


def _open_folder(path: Path, *, hint: str) -> WeightFile:
    entries = sorted(path.iterdir())
    files = _one_format([f for f in entries if f.suffix in SUFFIXES and f.is_file()])
    indices = _one_format(sorted(path.glob(f"*{INDEX}")), end=INDEX)
    if len(indices) == 1:
        return _open_shards(indices[0])
    named = [file for file in files if file.stem in CONFIGS]
    chosen = named if len(named) == 1 else files
    if indices or len(chosen) != 1:
        found = listed(file.name for file in (*indices, *files)) or "none"
        raise CheckpointError(
            f"{path} is not a folder with one network (files of weights in it: {found}); give the"
            " file that is meant" + (f"; {hint}" if hint else "")
        )
    file = open_container(chosen[0])
    if file.config is None and (path / "config.json").is_file():
        file.config = read_object(path / "config.json")
    return file


def _one_format(files: list[Path], *, end: str = "") -> list[Path]:
    """`files` without pickles (`.bin` in public folders) of what is there as safetensors, too."""
    if not any(file.name.endswith(f".safetensors{end}") for file in files):
        return files
    return [file for file in files if not file.name.endswith(f".bin{end}")]


def _open_file(path: Path) -> WeightFile:
    if not path.is_file():
        raise CheckpointError(f"{path} is no file but a folder, a pipe or a device")
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{path} is a GGUF file, whose weights are quantised; use the bf16 or fp32 file of the"
            " same model"
        )
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{path} is no file of weights: expected a name ending in {', '.join(SUFFIXES)}, or a"
            " folder"
        )
    file = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    for stem, name in CONFIGS.items():
        if path.stem.startswith(stem) and (config := path.with_name(name)).is_file():
            file.config = read_object(config)
    return file


def _open_pickle(path: Path) -> WeightFile:
    found = read_pickle(path)
    return WeightFile(
        path,
        container="torch pickle" if found.mapped else "torch pickle of the old format",
        headers={key: value.to("meta") for key, value in found.tensors.items()},
        read=found.read,
        others=found.others,
        unnamed=found.unnamed,
    )


def _open_safetensors(path: Path) -> WeightFile:
    entries, metadata = read_header(path)
    headers = {key: header for key, (header, _) in entries.items()}
    return WeightFile(
        path,
        container="safetensors",
        headers=headers,
        read=lambda key: read_entry(path, *entries[key]),
        metadata=metadata,
    )


def _open_shards(index: Path) -> WeightFile:
    """The files of an index: all must be there, and hold together what it says."""
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no weight_map; it is not an index of shards")
    for name in where.values():
        if not (is_plain_name(name) and name.endswith(SUFFIXES)):
            raise CheckpointError(
                f"{index} names the shard {name!r}, which is no file of weights in its folder"
            )
    names = sorted(set(where.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(names)} shards, of which {len(absent)} are not beside it:"
            f" {listed(map(repr, absent))}; the download is incomplete, or the index is damaged"
        )
    shards = {name: _open_file(index.parent / name) for name in names}
    missing = sorted(key for key, name in where.items() if key not in shards[name])
    extra = sorted(key for name, shard in shards.items() for key in shard if where.get(key) != name)
    if missing or extra:
        told = f"tensors that the index lists and the shards lack: {listed(missing) or 'none'}"
        raise CheckpointError(
            f"{index} disagrees with its shards; {told}; the reverse: {listed(extra) or 'none'}"
        )
    first = shards[names[0]]
    file = WeightFile(
        index.parent,
        container=f"{len(names)} shards, {first.container}",
        headers={key: shards[name].headers[key] for key, name in where.items()},
        read=lambda key: shards[where[key]][key],
        others=[key for shard in shards.values() for key in shard.others],
        unnamed=[key for shard in shards.values() for key in shard.unnamed],
        metadata=first.metadata,
        config=first.config,
    )
    file.sources = (index, *(shard.path for shard in shards.values()))
    return file
