"""Directories of torch.distributed.checkpoint (DCP): a pickled `.metadata` with the place of every
piece; each piece is a torch pickle.

The only reader of them in the package. torch's own executes `.metadata` as any pickle, every time
it is asked for it, and entries that are no tensors too. Here the metadata is read inert, its
statements are compared with each other and with the files, and torch's planner is handed records
made from what was checked; entries that are no tensors are named and never opened.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from rcm.core.errors import CheckpointError, first_line
from rcm.storage.inert_pickle import Made, Named, Stranger, read_inert
from rcm.storage.inside import is_plain_name
from rcm.storage.pickle_file import DTYPES, read_tensor
from rcm.storage.state_dicts import LazyWeights

METADATA = ".metadata"
_MOST_METADATA = 1 << 28
_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA, _TENSOR, _BYTES = (
    f"{_MODULE}.Metadata",
    f"{_MODULE}.TensorStorageMetadata",
    f"{_MODULE}.BytesStorageMetadata",
)
_PROPERTIES, _CHUNK, _INDEX = (
    f"{_MODULE}.TensorProperties",
    f"{_MODULE}.ChunkStorageMetadata",
    f"{_MODULE}.MetadataIndex",
)
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
NAMES = frozenset(
    (
        _METADATA,
        _TENSOR,
        _BYTES,
        _PROPERTIES,
        _CHUNK,
        _INDEX,
        _PLACE,
        f"{_MODULE}.StorageMeta",
        f"{_MODULE}._MEM_FORMAT_ENCODING",
    )
    + ("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict", *DTYPES)
    + (
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
    )
)
"""Everything that a `.metadata` may name."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a piece inside its tensor."""


class DcpFolder(LazyWeights):
    """The tensors of a DCP directory, checked when it is opened, read when asked for.

    `headers` has them as meta tensors; `others` are the keys of entries that are no tensors, which
    are never read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        if not (self.path / METADATA).is_file():
            raise CheckpointError(
                f"{self.path} is not a DCP checkpoint: it has no {METADATA} file (an interrupted"
                " save, or another path is meant)"
            )
        try:
            tensors, self._places, self.others = _parsed(self.path / METADATA)
        except Stranger as error:
            raise CheckpointError(f"{self.path / METADATA} is refused: {error}") from error
        except Exception as error:
            reason = str(error) if isinstance(error, CheckpointError) else first_line(error)
            raise CheckpointError(
                f"{self.path / METADATA} cannot be read ({reason}); it is damaged"
            ) from error
        self._require_complete()
        self.headers = {
            key: torch.empty(size, dtype=dtype, device="meta")
            for key, (dtype, size, _) in tensors.items()
        }
        self._chunks = {key: boxes for key, (_, _, boxes) in tensors.items()}

    def __getitem__(self, key: str) -> Tensor:
        """The whole tensor on the CPU."""
        full = torch.empty_like(self.headers[key], device="cpu")
        for box in self._chunks[key]:
            where = tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
            full[where] = self.piece(key, box)
        return full

    def piece(self, key: str, box: Box) -> Tensor:
        """One stored piece, of the dtype and the sizes that the metadata states."""
        file, offset, length = self._places[key, box[0]]
        content = bytearray(length)
        with open(self.path / file, "rb", buffering=0) as stream:
            stream.seek(offset)
            view, done = memoryview(content), 0
            while done < length and (got := stream.readinto(view[done:])):
                done += got
        found = read_tensor(
            content, name=f"{self.path / file}: the piece of {key} at byte {offset}"
        )
        if found.dtype != self.headers[key].dtype or tuple(found.shape) != box[1]:
            raise CheckpointError(
                f"{self.path / file}: the piece of {key} has shape {tuple(found.shape)} and dtype"
                f" {found.dtype}, {METADATA} states {box[1]} and {self.headers[key].dtype}"
            )
        return found

    def load_into(self, part: dict[str, Tensor]) -> None:
        """Fill the tensors of `part` (plain or sharded in any way) from the entries of the same
        names; other dtypes are converted. Collective where a process group exists. Raises torch's
        `CheckpointException` with what went wrong on each rank.
        """
        if absent := sorted(set(part) - set(self.headers)):
            raise CheckpointError(f"{self.path} lacks {', '.join(absent[:8])}")
        if not part:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                part,
                storage_reader=_CheckedReader(self),
                planner=DefaultLoadPlanner(),
                no_dist=not dist.is_initialized(),
            )

    def metadata(self) -> Metadata:
        """torch's record of the tensors, made from what was checked."""
        entries = {
            key: TensorStorageMetadata(
                TensorProperties(self.headers[key].dtype),
                self.headers[key].shape,
                [
                    ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                    for offsets, sizes in self._chunks[key]
                ],
            )
            for key in self.headers
        }
        return Metadata(entries, storage_data={})

    def _require_complete(self) -> None:
        """Every file that the metadata names exists, is long enough for what should be in it, and
        holds no two pieces at one place.
        """
        spans: dict[str, list[tuple[int, int]]] = {}
        for file, offset, length in self._places.values():
            spans.setdefault(file, []).append((offset, length))
        for name, pieces in sorted(spans.items()):
            file, end = self.path / name, 0
            if not file.is_file():
                raise CheckpointError(
                    f"{self.path} lacks {name}, one of its {len(spans)} files; the copy or the save"
                    " is incomplete"
                )
            for offset, length in sorted(pieces):
                if offset < end:
                    raise CheckpointError(
                        f"{self.path / METADATA} is damaged: it puts two pieces at byte {offset} of"
                        f" {name}"
                    )
                end = offset + length
            if file.stat().st_size < end:
                raise CheckpointError(
                    f"{file} is truncated: it has {file.stat().st_size} bytes, its tensors need"
                    f" {end}"
                )


class _CheckedReader(StorageReader):
    """What torch's planner reads through: a folder that was checked before."""

    def __init__(self, folder: DcpFolder) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing: the folder was opened before."""

    def read_metadata(self) -> Metadata:
        return self.folder.metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing: the places are the folder's."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            if item.type is not LoadItemType.TENSOR:
                raise CheckpointError(f"{self.folder.path}: {item.storage_index.fqn} is no tensor")
            target = planner.resolve_tensor(item)
            target.detach().copy_(
                self._stored(item.storage_index, item.storage_offsets, item.lengths)
            )
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _stored(self, index: MetadataIndex, offsets: torch.Size, lengths: torch.Size) -> Tensor:
        box = next(
            box for box in self.folder._chunks[index.fqn] if box[0] == tuple(index.offset or ())
        )
        piece = self.folder.piece(index.fqn, box)
        return piece[
            tuple(slice(start, start + size) for start, size in zip(offsets, lengths, strict=True))
        ]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return False


def _parsed(
    path: Path,
) -> tuple[
    dict[str, tuple[torch.dtype, tuple[int, ...], list[Box]]],
    dict[tuple[str, tuple[int, ...]], tuple[str, int, int]],
    list[str],
]:
    """(dtype, size and pieces of each tensor; file, first byte and length of each piece; keys of
    what is no tensor).
    """
    if path.stat().st_size > _MOST_METADATA:
        raise CheckpointError(f"it has more than {_MOST_METADATA} bytes")
    stream = io.BytesIO(path.read_bytes())
    state = _state(read_inert(stream, names=NAMES), _METADATA)
    if stream.read(1):
        raise CheckpointError("there are bytes after its end")
    listed, stored = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise CheckpointError("it lists no entries or no places")
    tensors, others = {}, []
    for key, entry in listed.items():
        if not isinstance(key, str) or not isinstance(entry, Made):
            raise CheckpointError(f"entry {key!r} is no record of a tensor")
        if entry.kind == _BYTES:
            others.append(key)
        else:
            tensors[key] = _tensor(key, entry)
    places = {}
    for index, place in stored.items():
        name, offset = _index(index)
        if name not in listed or (name, offset) in places:
            raise CheckpointError(
                f"it states the place of {name!r} at {offset}, which is no entry or has two"
            )
        places[name, offset] = _place(name, place)
    for key, (dtype, _, boxes) in tensors.items():
        for offsets, sizes in boxes:
            if (key, offsets) not in places:
                raise CheckpointError(f"the piece of {key!r} at {offsets} has no place")
            if places[key, offsets][2] < math.prod(sizes) * dtype.itemsize:
                raise CheckpointError(
                    f"the piece of {key!r} at {offsets} has fewer bytes than its shape needs"
                )
    wanted = {(key, box[0]) for key, (_, _, boxes) in tensors.items() for box in boxes}
    if strangers := [
        name for name, offset in places if name in tensors and (name, offset) not in wanted
    ]:
        raise CheckpointError(
            f"it states the place of a piece of {strangers[0]!r} that the entry does not have"
        )
    return tensors, places, others


def _state(record: Any, kind: str) -> dict[str, Any]:
    """The fields of an inert record of `kind`."""
    if not isinstance(record, Made) or record.kind != kind or not isinstance(record.state, dict):
        found = record.kind if isinstance(record, Made) else type(record).__name__
        raise CheckpointError(f"it holds a {found} where a {kind.rpartition('.')[2]} belongs")
    return record.state


def _size(value: Any, what: str) -> tuple[int, ...]:
    numbers = (
        value.arguments[0]
        if isinstance(value, Made) and value.kind == "torch.Size" and len(value.arguments) == 1
        else None
    )
    if (
        not isinstance(numbers, tuple | list)
        or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers)
        or len(numbers) > 16
    ):
        raise CheckpointError(f"{what} has an impossible size")
    return tuple(numbers)


def _tensor(key: str, entry: Made) -> tuple[torch.dtype, tuple[int, ...], list[Box]]:
    state = _state(entry, _TENSOR)
    size, chunks = _size(state.get("size"), repr(key)), state.get("chunks")
    properties = state.get("properties")
    if (
        not isinstance(properties, Made)
        or properties.kind != _PROPERTIES
        or not isinstance(properties.state, tuple)
    ):
        raise CheckpointError(f"{key!r} has no properties")
    dtype, layout, *_ = (*properties.state, None, None)
    if not isinstance(dtype, Named) or dtype.name not in DTYPES:
        raise CheckpointError(f"{key!r} has no known dtype")
    if isinstance(layout, Made) and layout.arguments != ("torch.strided",):
        raise CheckpointError(f"{key!r} is no dense tensor")
    if not isinstance(chunks, list):
        raise CheckpointError(f"{key!r} has no pieces")
    boxes = []
    for chunk in chunks:
        piece = _state(chunk, _CHUNK)
        boxes.append(
            (
                _size(piece.get("offsets"), f"a piece of {key!r}"),
                _size(piece.get("sizes"), f"a piece of {key!r}"),
            )
        )
    if not _tiles(size, boxes) or math.prod(size) >= 1 << 62:
        raise CheckpointError(f"the pieces of {key!r} do not fill its shape {size} once")
    return DTYPES[dtype.name], size, boxes


def _tiles(size: tuple[int, ...], boxes: list[Box]) -> bool:
    """Whether the boxes cover every place of a tensor exactly once."""
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
    for offsets, sizes in boxes:
        cells[
            tuple(
                slice(where[start], where[start + n])
                for where, start, n in zip(at, offsets, sizes, strict=True)
            )
        ] += 1
    return bool(cells.max() == 1)


def _index(index: Any) -> tuple[str, tuple[int, ...]]:
    state = _state(index, _INDEX)
    name, offset = state.get("fqn"), state.get("offset")
    if not isinstance(name, str):
        raise CheckpointError("it states the place of something without a name")
    return name, () if offset is None else _size(offset, repr(name))


def _place(key: str, place: Any) -> tuple[str, int, int]:
    """(file, first byte, length) of a piece; the file a plain name, so that it lies in the
    folder.
    """
    state = _state(place, _PLACE)
    file, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
    if isinstance(file, Made) and file.kind.startswith("pathlib."):
        file = "/".join(map(str, file.arguments))
    if not is_plain_name(file):
        raise CheckpointError(f"the file of {key!r} is {file!r}, which is no name in the folder")
    if (
        type(offset) is not int
        or type(length) is not int
        or not (0 <= offset < 1 << 62 and 0 <= length < 1 << 62)
    ):
        raise CheckpointError(f"the place of {key!r} is impossible")
    if state.get("transform_descriptors"):
        raise CheckpointError(
            f"{key!r} is stored transformed ({state['transform_descriptors']!r}), which this reader"
            " does not undo"
        )
    return file, offset, length
