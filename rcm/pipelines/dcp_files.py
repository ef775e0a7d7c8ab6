"""torch.distributed.checkpoint (DCP) directories, read tensor by tensor in one process: those of this package's runs, of rcm (.dcp), and
of torch's own conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from rcm.core.errors import CheckpointError


def dcp_entries(directory: Path) -> tuple[dict[str, Tensor], list[str], Callable[[str], Tensor]]:
    """(meta tensors by key, keys of entries that are no tensors, a function that reads one tensor to the CPU) of a DCP directory.

    Raises `CheckpointError` when its metadata cannot be read, or a file it names is missing or too short.
    """
    reader = FileSystemReader(str(directory))
    try:
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
    except Exception as error:
        raise CheckpointError(f"{directory}/.metadata cannot be read ({type(error).__name__}: {error}); it is damaged") from error
    _require_complete(directory, metadata)
    entries = metadata.state_dict_metadata
    headers = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in entries.items()
        if hasattr(entry, "size")
    }

    def read(key: str) -> Tensor:
        full = torch.empty(headers[key].shape, dtype=headers[key].dtype)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({key: full}, metadata, is_coordinator=True)
        reader.read_data(planner.create_local_plan(), planner).wait()
        return full

    return headers, [key for key in entries if key not in headers], read


def _require_complete(directory: Path, metadata: Metadata) -> None:
    """Every file that the metadata names exists and is long enough for what should be in it."""
    needed: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, size in sorted(needed.items()):
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{directory} lacks {name}, one of its {len(needed)} files; the copy or the save is incomplete")
        if file.stat().st_size < size:
            raise CheckpointError(f"{file} is truncated: it has {file.stat().st_size} bytes, its tensors need {size}")
