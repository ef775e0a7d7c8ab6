"""torch's pickles, of tensors only: the zip archive, mapped; and the format from before torch 1.6, read into memory."""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from rcm.core.errors import CheckpointError, first_line
from rcm.storage.state_dicts import flatten

_LOCAL_HEADER = b"PK\x03\x04"


@dataclass(frozen=True)
class PickledTensors:
    """Tensors by key, nested state dicts joined with dots; keys of what is no tensor; whether the file is mapped rather than read."""

    tensors: dict[str, Tensor]
    others: tuple[str, ...]
    mapped: bool


def read_pickle(path: Path) -> PickledTensors:
    """The tensors of a torch pickle.

    Raises `CheckpointError` for a file that is truncated, damaged, of another format, no dict, larger than this machine can map, or that
    needs other Python objects (none is executed).
    """
    mapped, state = _loaded(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict")
    if not mapped:
        logger.warning("{} has torch's format from before version 1.6, which cannot be mapped: it was read into memory as a whole", path)
    flat = flatten({str(key): value for key, value in state.items()})
    tensors = {key: value.detach() for key, value in flat.items() if isinstance(value, Tensor)}
    return PickledTensors(tensors, others=tuple(key for key in flat if key not in tensors), mapped=mapped)


def is_archive(path: Path) -> bool:
    """Whether a file begins as a zip archive does."""
    with open(path, "rb") as file:
        return file.read(len(_LOCAL_HEADER)) == _LOCAL_HEADER


def _loaded(path: Path) -> tuple[bool, Any]:
    told = "it is damaged, truncated or not a torch pickle: copy or download it again"
    try:
        mapped = is_archive(path)
        if mapped:
            _require_whole(path)
        return mapped, torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if stranger := re.search(r"GLOBAL (\S+)", str(error)):
            words = f"it needs Python objects other than tensors ({stranger[1]}), which are not executed; save its state dict alone"
            raise CheckpointError(f"{path} cannot be read: {words}") from error
        # before that mark torch explains how to execute the file, which nobody should do
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        raise CheckpointError(f"{path} cannot be read ({first_line(pickle.UnpicklingError(reason))}); {told}") from error
    except Exception as error:
        if "Cannot allocate memory" in str(error):
            told = "a torch pickle is mapped as a whole, and this machine has less memory; use a safetensors file of the same weights"
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); {told}") from error


def _require_whole(path: Path) -> None:
    """Check an archive's directory and the place of every entry, so that a file with a hole in the middle is found before it is used."""
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("the end of the archive is missing")
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        end = archive.start_dir
    with open(path, "rb") as file:
        for entry, following in zip(entries, [e.header_offset for e in entries[1:]] + [end], strict=True):
            file.seek(entry.header_offset)
            head = file.read(30)
            name_size, extra_size = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
            name = file.read(name_size).decode("utf-8" if entry.flag_bits & 0x800 else "cp437")
            ends = entry.header_offset + 30 + name_size + extra_size + entry.compress_size
            if head[:4] != _LOCAL_HEADER or name != entry.orig_filename or ends > following:
                raise zipfile.BadZipFile(f"entry {entry.filename} is not where the directory says")
