"""torch's pickles, of tensors only: the zip archive, mapped; and the format from before torch 1.6,
read into memory.

torch.load is not used: even its restricted form trusts the sizes that a pickle states about the
bytes beside it, and a list of names that any imported library may extend. Here the pickle is read
inert (rcm/storage/inert_pickle.py), every tensor is compared with the bytes that are there, and
only then made. An archive has checksums: that of the pickle is compared when it is opened, those of
the numbers when they are read (torch compares none).
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO, cast

import torch
from loguru import logger
from torch import Tensor

from rcm.core.errors import CheckpointError, first_line
from rcm.storage.inert_pickle import Made, Named, Stranger
from rcm.storage.state_dicts import flatten, listed
from rcm.storage.torch_layout import (
    LOCAL_HEADER,
    NOWHERE,
    Held,
    Piece,
    read_archive,
    read_old_format,
)

_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES: dict[str, torch.dtype] = {f"torch.{name}": getattr(torch, name) for name in _DTYPES}
"""Dtypes that a stored tensor may have, by torch's name."""
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_TENSOR_OF_NEW_DTYPE = "torch._utils._rebuild_tensor_v3"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_MAKERS = (*_TENSOR, _TENSOR_OF_NEW_DTYPE, *_PARAMETERS, _WITH_ATTRIBUTES)
_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
NAMES = frozenset(
    (*DTYPES, *_STORAGES, *_MAKERS, *_CLASSES)
    + ("collections.OrderedDict", "torch.Size", "torch.device")
)
"""Everything that a pickle of tensors may name."""
_ODD_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch.distributed.tensor.DTensor": "a sharded tensor (DTensor)",
}


@dataclass(frozen=True)
class PickledTensors:
    """Tensors by dotted key; keys of what is no tensor; those of them with tensors that have no
    name (in a list, or under a number); whether the file is mapped, not read.

    `read(key)`: the tensor, once its bytes have been compared with their checksum.
    """

    tensors: dict[str, Tensor]
    others: tuple[str, ...]
    unnamed: tuple[str, ...]
    mapped: bool
    read: Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as the file states it; offset and strides in elements."""

    piece: Piece
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(path: Path) -> PickledTensors:
    """The tensors of a torch pickle.

    Raises `CheckpointError` for a file that is truncated, damaged, of another format, no dict,
    larger than this machine can map, or that needs other Python objects (none is executed).
    """
    with _explained(path):
        mapped = is_archive(path)
        value, made, require_intact = _opened(path)
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} holds {_kind_of(value)}, not a state dict")
        if len({str(key) for key in value}) < len(value):
            raise CheckpointError(f"{path} has two entries of one name")
        flat = flatten({str(key): inner for key, inner in value.items()})
        tensors = {key: made(inner) for key, inner in flat.items() if _is_tensor(inner)}
    if not mapped:
        logger.warning(
            "{} has torch's format from before version 1.6, which cannot be mapped: it was read"
            " into memory as a whole",
            path,
        )

    def read(key: str) -> Tensor:
        with _explained(path):
            require_intact(flat[key])
        return tensors[key]

    others = tuple(key for key in flat if key not in tensors)
    unnamed = tuple(key for key in others if _holds_tensor(flat[key]))
    if unnamed:
        told = (
            "{}: the tensors under {} have no names (they are numbered or listed) and are left out"
        )
        logger.warning(told, path, listed(unnamed))
    return PickledTensors(tensors, others, unnamed, mapped, read)


def read_tensor(source: Path | bytes | bytearray, *, name: str) -> Tensor:
    """The one tensor of a torch pickle: of the file `source`, or of these bytes; `name` says in
    errors what it is.

    Dense, on the CPU, without gradient; of a bytearray, a view of it. Raises `CheckpointError` as
    `read_pickle`, and for anything else than one tensor.
    """
    with _explained(name):
        value, made, require_intact = _opened(source)
        if not _is_tensor(value):
            raise CheckpointError(f"{name} holds {_kind_of(value)}, expected one tensor")
        tensor = made(value)
        require_intact(value)
        return tensor


def write_pickle(path: Path, value: object) -> None:
    """torch.save, flushed to disk. What the system refuses is raised as its `OSError`, which torch
    has other words for.
    """
    with open(path, "wb") as file:
        watched = _Watched(file)
        try:
            torch.save(value, watched)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise watched.refusal or error from None
        file.flush()
        os.fsync(file.fileno())


class _Watched:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.flush = file.flush
        self.refusal: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.refusal = error
            raise


def is_archive(path: Path) -> bool:
    """Whether a file begins as a zip archive does."""
    with open(path, "rb") as file:
        return file.read(len(LOCAL_HEADER)) == LOCAL_HEADER


@contextmanager
def _explained(source: Path | str) -> Iterator[None]:
    """Turn every failure inside into a `CheckpointError` about `source`."""
    try:
        yield
    except Stranger as error:
        odd = _ODD_TENSORS.get(error.name)
        told = (
            f"it holds {odd}; save dense tensors" if odd else f"{error}; save its state dict alone"
        )
        raise CheckpointError(f"{source} cannot be read: {told}") from error
    except CheckpointError as error:
        if str(source) in str(error):
            raise
        raise CheckpointError(f"{source} cannot be read: {error}") from error
    except Exception as error:
        told = "it is damaged, truncated or not a torch pickle: copy or download it again"
        if "Cannot allocate memory" in str(error):
            told = (
                "a torch pickle is mapped as a whole, and this machine has less memory; use a"
                " safetensors file of the same weights"
            )
        raise CheckpointError(f"{source} cannot be read ({first_line(error)}); {told}") from error


def _opened(
    source: Path | bytes | bytearray,
) -> tuple[Any, Callable[[Any], Tensor], Callable[[Any], None]]:
    """What the pickle holds, inert; what makes a tensor of an entry that is one; what compares its
    bytes with their checksum, once.
    """
    held = bytearray(source) if isinstance(source, bytes) else source
    if isinstance(held, Path) and held.exists() and not held.is_file():
        raise CheckpointError("it is no file but a folder, a pipe or a device")
    with cast(
        BinaryIO,
        open(held, "rb") if isinstance(held, Path) else io.BufferedReader(Held(held)),
    ) as file:
        archive = file.read(len(LOCAL_HEADER)) == LOCAL_HEADER
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        read = read_archive if archive else read_old_format
        value, places = read(file, names=NAMES, storages=_piece)
    if isinstance(held, Path):
        whole = torch.UntypedStorage.from_file(str(held), False, size)
    else:
        whole = torch.frombuffer(held, dtype=torch.uint8).untyped_storage()
    made: dict[str, torch.UntypedStorage] = {}
    intact: set[str] = set()

    def storage(piece: Piece) -> torch.UntypedStorage:
        place = places[piece.key]
        if piece.key not in made:
            part = whole[place.start : place.start + place.length]
            made[piece.key] = part if archive else part.clone()
        return made[piece.key]

    def make(entry: Any) -> Tensor:
        view = _described(entry)
        _require_inside(view, length=places.get(view.piece.key, NOWHERE).length)
        empty = torch.empty(0, dtype=view.dtype)
        return empty.set_(storage(view.piece), view.offset, view.size, view.stride)

    def require_intact(entry: Any) -> None:
        piece = _described(entry).piece
        if piece.key not in intact and places[piece.key].length:
            content = torch.empty(0, dtype=torch.uint8).set_(storage(piece)).numpy().data
            places[piece.key].require_intact(content, f"storage {piece.key}")
        intact.add(piece.key)

    return value, make, require_intact


def _piece(pid: Any) -> Piece:
    """The storage of a persistent id ("storage", class, key, device, elements[, view])."""
    word, kind, key, _, count, *view = pid
    if (
        word != "storage"
        or not isinstance(kind, Named)
        or kind.name not in _STORAGES
        or type(count) is not int
        or not isinstance(key, str | int)
        or any(view)
    ):
        raise pickle.UnpicklingError("it refers to something that is no storage")
    return Piece(str(key), _STORAGES[kind.name], count)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Made) and value.kind in _MAKERS


def _holds_tensor(value: Any) -> bool:
    waiting, seen = [value], set()
    while waiting:
        found = waiting.pop()
        if _is_tensor(found):
            return True
        if isinstance(found, dict | list | tuple) and id(found) not in seen:
            seen.add(id(found))
            waiting += found.values() if isinstance(found, dict) else found
    return False


def _kind_of(value: Any) -> str:
    if _is_tensor(value):
        return "a tensor"
    return f"an object {value.kind}" if isinstance(value, Made) else f"a {type(value).__name__}"


def _described(entry: Any) -> _View:
    """What the arguments of a tensor's maker say."""
    kind, arguments = entry.kind, entry.arguments
    for _ in range(3):  # a parameter with attributes around a tensor
        if kind in _PARAMETERS and _is_tensor(arguments[0]):
            kind, arguments = arguments[0].kind, arguments[0].arguments
        elif kind == _WITH_ATTRIBUTES and all(isinstance(a, Named) for a in arguments[:2]):
            if arguments[1].name not in _CLASSES:
                raise pickle.UnpicklingError(f"it holds a tensor of the class {arguments[1].name}")
            kind, arguments = arguments[0].name, arguments[2]
    if kind not in (*_TENSOR, _TENSOR_OF_NEW_DTYPE) or not isinstance(arguments[0], Piece):
        raise pickle.UnpicklingError("it holds a tensor that is none")
    piece, offset, size, stride = arguments[:4]
    dtype, new = piece.dtype, kind == _TENSOR_OF_NEW_DTYPE
    if any(arguments[7 if new else 6 :]):
        raise CheckpointError(
            "it holds a conjugated or negated view; save x.resolve_conj().resolve_neg()"
        )
    if new:
        if not isinstance(arguments[6], Named) or arguments[6].name not in DTYPES:
            raise pickle.UnpicklingError("it holds a tensor of no known dtype")
        dtype = DTYPES[arguments[6].name]
    size, stride = (
        tuple(v.arguments[0]) if isinstance(v, Made) and v.kind == "torch.Size" else tuple(v)
        for v in (size, stride)
    )
    possible = all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *size, *stride))
    if not possible or len(size) != len(stride):
        raise pickle.UnpicklingError(
            f"it holds a tensor of impossible shape {short(size)} and strides {short(stride)}"
        )
    return _View(piece, dtype, offset, size, stride)


def _require_inside(view: _View, *, length: int) -> None:
    """The storage, of `length` bytes in the file, has the bytes that it states, and the tensor lies
    in it, each element in a place of its own.
    """
    stated = view.piece.count * view.piece.dtype.itemsize
    if view.piece.count < 0 or stated != length:
        raise pickle.UnpicklingError(
            f"storage {view.piece.key} should have {stated} bytes, the file has {length}"
        )
    elements, there = math.prod(view.size), length // view.dtype.itemsize
    steps = sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    if elements > there or (elements and view.offset + steps >= there):
        advice = ", an expanded view? save x.contiguous()" if 0 in view.stride else ""
        raise pickle.UnpicklingError(
            f"a tensor of shape {list(view.size)} reaches beyond the {there} elements of its"
            f" storage{advice}"
        )
