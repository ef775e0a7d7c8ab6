"""Files as nobody's program writes them: pickles that run code or lie about their bytes, DCP
folders and safetensors of altered records.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from tests.faults.case import Bomb, canary
from tests.support.weight_folders import write_dcp


class _Named:
    """Pickled as the global "module name", whatever that is here."""

    def __init__(self, full: str) -> None:
        self.full = full


@dataclass
class Storage:
    """A persistent id: what the pickle says of a storage."""

    key: str = "0"
    kind: str = "torch.FloatStorage"
    count: Any = 4
    word: str = "storage"


@dataclass
class Call:
    """A call in the pickle."""

    function: str
    arguments: tuple


def tensor(storage: Any = None, *, offset: Any = 0, size: Any = (4,), stride: Any = (1,), function: str = "_rebuild_tensor_v2") -> Call:
    """What torch writes for a tensor of four float32, or what it never would."""
    rest = (False, collections.OrderedDict())
    return Call(f"torch._utils.{function}", (storage or Storage(), offset, size, stride, *rest))


class _Pickler(pickle._Pickler):
    def persistent_id(self, value: object) -> object:
        if isinstance(value, Storage):
            return (value.word, _Named(value.kind), value.key, "cpu", value.count)
        return None

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Named):
            module, _, name = value.full.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        elif isinstance(value, Call):
            self.save(_Named(value.function))
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def pickled(value: object) -> bytes:
    """`value` with the stand-ins above, protocol 2 as torch has it."""
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(value)
    return out.getvalue()


def archive(
    path: Path,
    data: object,
    *,
    storages: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    more: Mapping[str, bytes] | None = None,
    drop: str = "",
) -> Path:
    """A zip as torch lays it out: `data` (an object, or the bytes of a pickle), its storages (by
    default four float32), other entries.
    """
    entries = {"data.pkl": data if isinstance(data, bytes) else pickled(data), "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{key}": value for key, value in ({"0": bytes(16)} if storages is None else storages).items()}
    entries |= more or {}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            if name != drop:
                file.writestr(f"archive/{name}", content)
    return path


def exploding(folder: Path, value: object = None) -> Bomb:
    """The object that shows that a file was executed."""
    return Bomb(canary(folder), value)


def old_format(path: Path, value: object, *, bomb: Bomb | None = None, place: int = 3) -> Path:
    """torch's first format by hand, with `bomb` in place of one of its pickles (0: magic number, 1,
    2: version, system, 3: the value).
    """
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, []]
    if bomb is not None:
        parts[place] = bomb
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    return path


def instructions(path: Path, code: str) -> Path:
    """An archive whose data.pkl is these pickle instructions."""
    return archive(path, b"\x80\x02" + code.encode("latin-1"))


def dcp_folder(folder: Path, change: Callable[[Metadata], object] | None = None, state: dict[str, Any] | None = None) -> Path:
    """A DCP directory of two tensors whose metadata `change` has altered (or replaced, by what it
    returns).
    """
    path = write_dcp(folder / "model", state or {"net.a": torch.arange(6.0).reshape(2, 3), "net.b": torch.ones(4, dtype=torch.bfloat16)})
    if change is not None:
        metadata = dcp.FileSystemReader(str(path)).read_metadata()
        altered = change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata if altered is None else altered))
    return path


def safetensors(path: Path, header: object, *, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header (an object, or its bytes) and `data`; `length`: what it
    states of its header.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
