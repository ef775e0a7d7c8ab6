"""The pickled `.metadata` of a directory of torch.distributed.checkpoint (DCP), read inert: what
its tensors are and where their pieces lie, once its statements agree with each other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import torch

from rcm.core.errors import CheckpointError, first_line
from rcm.storage.inert_pickle import Made, Named, Stranger, read_inert
from rcm.storage.inside import is_plain_name
from rcm.storage.pickle_file import DTYPES

_MOST_BYTES = 1 << 28
_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA, _TENSOR, _BYTES, _PROPERTIES, _CHUNK, _INDEX = (
    f"{_MODULE}.{name}"
    for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties")
    + ("ChunkStorageMetadata", "MetadataIndex")
)
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_PATHS = ("Path", "PosixPath", "WindowsPath", "_local.PosixPath", "_local.WindowsPath")
NAMES = frozenset(
    (_METADATA, _TENSOR, _BYTES, _PROPERTIES, _CHUNK, _INDEX, _PLACE)
    + (f"{_MODULE}.StorageMeta", f"{_MODULE}._MEM_FORMAT_ENCODING", "collections.OrderedDict")
    + ("torch.Size", "torch.serialization._get_layout", *DTYPES)
    + tuple(f"pathlib.{name}" for name in _PATHS)
)
"""Everything that a `.metadata` may name."""

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the bytes of a file (a plain name) with it as a torch pickle."""

    offsets: Numbers
    sizes: Numbers
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor: its pieces cover every place of it exactly once."""

    dtype: torch.dtype
    size: Numbers
    pieces: tuple[Piece, ...]


def read_metadata(path: Path) -> tuple[dict[str, Entry], list[str]]:
    """The tensors by key, and the keys of entries that are no tensors. `CheckpointError` for a file
    that is damaged, contradicts itself, or names other objects than those of DCP.
    """
    try:
        return _parsed(path)
    except Stranger as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:
        reason = str(error) if isinstance(error, CheckpointError) else first_line(error)
        raise CheckpointError(f"{path} cannot be read ({reason}); it is damaged") from error


def _parsed(path: Path) -> tuple[dict[str, Entry], list[str]]:
    if path.stat().st_size > _MOST_BYTES:
        raise CheckpointError(f"it has more than {_MOST_BYTES} bytes")
    stream = io.BytesIO(path.read_bytes())
    state = _state(read_inert(stream, names=NAMES), _METADATA)
    if stream.read(1):
        raise CheckpointError("there are bytes after its end")
    listed, stored = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise CheckpointError("it lists no entries or no places")
    places: dict[str, dict[Numbers, tuple[str, int, int]]] = {}
    for index, place in stored.items():
        key, offsets = _index(index)
        mine = places.setdefault(key, {})
        if key not in listed or offsets in mine:
            raise CheckpointError(
                f"it states the place of {key!r} at {offsets}, which is no entry or has two"
            )
        mine[offsets] = _place(key, place)
    tensors, others = {}, []
    for key, entry in listed.items():
        if not isinstance(key, str) or not isinstance(entry, Made):
            raise CheckpointError(f"entry {short(key)} is no record of a tensor")
        if entry.kind == _BYTES:
            others.append(key)
        else:
            tensors[key] = _tensor(key, entry, places.get(key, {}))
    return tensors, others


def _tensor(key: str, entry: Made, places: dict[Numbers, tuple[str, int, int]]) -> Entry:
    """The tensor of `entry`; `places`: the file, first byte and length of every piece of it."""
    state = _state(entry, _TENSOR)
    size, chunks = _size(state.get("size"), repr(key)), state.get("chunks")
    dtype = _dtype(key, state.get("properties"))
    if not isinstance(chunks, list):
        raise CheckpointError(f"{key!r} has no pieces")
    states, what = [_state(chunk, _CHUNK) for chunk in chunks], f"a piece of {key!r}"
    boxes = [(_size(s.get("offsets"), what), _size(s.get("sizes"), what)) for s in states]
    if not _tiles(size, boxes) or math.prod(size) >= 1 << 62:
        raise CheckpointError(f"the pieces of {key!r} do not fill its shape {size} once")
    for offsets, sizes in boxes:
        if offsets not in places:
            raise CheckpointError(f"the piece of {key!r} at {offsets} has no place")
        if places[offsets][2] < math.prod(sizes) * dtype.itemsize:
            raise CheckpointError(
                f"the piece of {key!r} at {offsets} has fewer bytes than its shape needs"
            )
    if len(places) > len(boxes):
        raise CheckpointError(
            f"it states the place of a piece of {key!r} that the entry does not have"
        )
    return Entry(dtype, size, tuple(Piece(at, box, *places[at]) for at, box in boxes))


def _state(record: Any, kind: str) -> dict[str, Any]:
    """The fields of an inert record of `kind`."""
    if not isinstance(record, Made) or record.kind != kind or not isinstance(record.state, dict):
        found = record.kind if isinstance(record, Made) else type(record).__name__
        raise CheckpointError(f"it holds a {found} where a {kind.rpartition('.')[2]} belongs")
    return record.state


def _size(value: Any, what: str) -> Numbers:
    listed = isinstance(value, Made) and value.kind == "torch.Size" and len(value.arguments) == 1
    numbers = value.arguments[0] if listed else None
    if (
        not isinstance(numbers, tuple | list)
        or len(numbers) > 16
        or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers)
    ):
        raise CheckpointError(f"{what} has an impossible size")
    return tuple(numbers)


def _dtype(key: str, properties: Any) -> torch.dtype:
    state = properties.state if isinstance(properties, Made) else None
    if not isinstance(state, tuple) or properties.kind != _PROPERTIES:
        raise CheckpointError(f"{key!r} has no properties")
    dtype, layout, *_ = (*state, None, None)
    if not isinstance(dtype, Named) or dtype.name not in DTYPES:
        raise CheckpointError(f"{key!r} has no known dtype")
    if isinstance(layout, Made) and layout.arguments != ("torch.strided",):
        raise CheckpointError(f"{key!r} is no dense tensor")
    return DTYPES[dtype.name]


def _tiles(size: Numbers, boxes: Sequence[tuple[Numbers, Numbers]]) -> bool:
    """Whether the boxes (offsets, sizes) cover every place of a tensor exactly once."""
    if len({offsets for offsets, _ in boxes}) < len(boxes):
        return False
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(size):
            return False
        if any(start + n > whole for start, n, whole in zip(offsets, sizes, size, strict=True)):
            return False
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(size):
        return False
    if len(boxes) == 1 or math.prod(size) == 0:
        return True
    # equal volume and inside: they tile unless two overlap, which is seen on the grid of their own
    # edges
    edges = [
        sorted({0, *(o[d] for o, _ in boxes), *(o[d] + s[d] for o, s in boxes)})
        for d in range(len(size))
    ]
    if math.prod(map(len, edges)) > 1 << 24:
        return False
    at = [{edge: i for i, edge in enumerate(listed)} for listed in edges]
    cells = np.zeros([len(edge) for edge in edges], dtype=np.uint16)
    for box in boxes:
        ends = zip(at, *box, strict=True)
        cells[tuple(slice(where[start], where[start + n]) for where, start, n in ends)] += 1
    return bool(cells.max() == 1)


def _index(index: Any) -> tuple[str, Numbers]:
    state = _state(index, _INDEX)
    name, offset = state.get("fqn"), state.get("offset")
    if not isinstance(name, str):
        raise CheckpointError("it states the place of something without a name")
    return name, () if offset is None else _size(offset, repr(name))


def _place(key: str, place: Any) -> tuple[str, int, int]:
    """(file, first byte, length) of a piece; `file` is a plain name, so lies in the folder."""
    state = _state(place, _PLACE)
    file: Any = state.get("relative_path")
    start: Any = state.get("offset")
    length: Any = state.get("length")
    if isinstance(file, Made) and file.kind.startswith("pathlib."):
        parts = file.arguments
        file = "/".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not is_plain_name(file):
        raise CheckpointError(
            f"the file of {key!r} is {short(file)}, which is no name in the folder"
        )
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (start, length)):
        raise CheckpointError(f"the place of {key!r} is impossible")
    if told := state.get("transform_descriptors"):
        raise CheckpointError(
            f"{key!r} is stored transformed ({short(told)}), which this reader does not undo"
        )
    return file, start, length
