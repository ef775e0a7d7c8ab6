"""Directories of torch.distributed.checkpoint (DCP): pickled `.metadata` and torch pickles.

The only reader of them in the package. torch's own executes `.metadata` as any pickle, every time
it is asked for it, and entries that are no tensors too. Here the metadata is read inert
(rcm/storage/dcp_metadata.py) and compared with the files, and torch's planner is handed records
made from what was checked; entries that are no tensors are named and never opened.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from rcm.core.errors import CheckpointError
from rcm.core.files import as_refused, read_exactly
from rcm.storage.dcp_metadata import Numbers, Piece, read_metadata
from rcm.storage.pickle_file import read_tensor
from rcm.storage.state_dicts import LazyWeights

METADATA = ".metadata"


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
        entries, self.others = read_metadata(self.path / METADATA)
        self.headers = {
            key: torch.empty(entry.size, dtype=entry.dtype, device="meta")
            for key, entry in entries.items()
        }
        self._pieces = {
            key: {piece.offsets: piece for piece in entry.pieces} for key, entry in entries.items()
        }
        self._require_complete()

    def __getitem__(self, key: str) -> Tensor:
        """The whole tensor on the CPU."""
        full = torch.empty_like(self.headers[key], device="cpu")
        for piece in self._pieces[key].values():
            full[_box(piece.offsets, piece.sizes)] = self.piece(key, piece.offsets)
        return full

    def piece(self, key: str, offsets: Numbers) -> Tensor:
        """The stored piece at `offsets`, of the dtype and the sizes that the metadata states."""
        stated, dtype = self._pieces[key][offsets], self.headers[key].dtype
        file, content = self.path / stated.file, bytearray(stated.length)
        read_exactly(file, content, start=stated.start)
        found = read_tensor(content, name=f"{file}: the piece of {key} at byte {stated.start}")
        if found.dtype != dtype or tuple(found.shape) != stated.sizes:
            raise CheckpointError(
                f"{file}: the piece of {key} has shape {tuple(found.shape)} and dtype"
                f" {found.dtype}, {METADATA} states {stated.sizes} and {dtype}"
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
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for key, header in self.headers.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
                for piece in self._pieces[key].values()
            ]
            properties = TensorProperties(header.dtype)
            entries[key] = TensorStorageMetadata(properties, header.shape, chunks)
        return Metadata(entries, storage_data={})

    def _require_complete(self) -> None:
        """Every file that the metadata names exists, is long enough for what should be in it, and
        holds no two pieces at one place.
        """
        files: dict[str, list[Piece]] = {}
        for pieces in self._pieces.values():
            for piece in pieces.values():
                files.setdefault(piece.file, []).append(piece)
        for name, stored in sorted(files.items()):
            file, end = self.path / name, 0
            if not file.is_file():
                raise CheckpointError(
                    f"{self.path} lacks {name}, one of its {len(files)} files; the copy or the save"
                    " is incomplete"
                )
            for piece in sorted(stored, key=lambda piece: (piece.start, piece.length)):
                if piece.start < end:
                    raise CheckpointError(
                        f"{self.path / METADATA} is damaged: it puts two pieces at byte"
                        f" {piece.start} of {name}"
                    )
                end = piece.start + piece.length
            if file.stat().st_size < end:
                raise CheckpointError(
                    f"{file} is truncated: it has {file.stat().st_size} bytes, its tensors need"
                    f" {end}"
                )


def reason_of(error: BaseException, *, path: Path) -> BaseException:
    """Why a save or a load failed: an `OSError` where the system refused on any rank, else the
    first rank's error; others than torch's `CheckpointException` are their own reason.
    """
    if isinstance(error, CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
        refusals = (cause for cause in causes if isinstance(cause, OSError))
        error = next(refusals, causes[0] if causes else error)
    return as_refused(error, path) or error


def _box(offsets: Numbers, sizes: Numbers) -> tuple[slice, ...]:
    return tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True))


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
        return self.folder.piece(index.fqn, tuple(index.offset or ()))[_box(offsets, lengths)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return False
