"""The safetensors format: an 8-byte length, a JSON header of names, dtypes, shapes and places, then the bytes of the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from rcm.core.errors import CheckpointError, first_line

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_header(path: Path) -> tuple[dict[str, tuple[Tensor, int]], dict[str, str]]:
    """Key -> (meta tensor, first byte) of a safetensors file, its length checked against them; and its metadata.

    Raises `CheckpointError` for a file that is truncated, damaged or of another format.
    """
    try:
        return _parsed(path)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}); it is damaged, truncated or not a safetensors file: copy or download it again"
        ) from error


def read_entry(path: Path, header: Tensor, start: int) -> Tensor:
    """The bytes from `start` on as a CPU tensor like `header`. Read, not mapped: a private mapping of the file counts as memory that the
    machine must have. Raises `OSError` where the file ends early.
    """
    flat = torch.empty(header.numel() * header.element_size(), dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        view, done = memoryview(flat.numpy()), 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise OSError(f"the file ends {len(view) - done} bytes early; it was changed after it was opened")
            done += got
    return flat.view(header.dtype).view(header.shape)


def _parsed(path: Path) -> tuple[dict[str, tuple[Tensor, int]], dict[str, str]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"its header should have {length} bytes, the file has {size}")
        listed = json.loads(file.read(length))
    metadata = listed.pop("__metadata__", {})
    entries, ends = {}, 0
    for key, entry in listed.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{key} has the unknown dtype {entry['dtype']}")
        header = torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]], device="meta")
        start, end = entry["data_offsets"]
        if end - start != header.numel() * header.element_size():
            raise ValueError(f"{key} has {end - start} bytes, its shape needs {header.numel() * header.element_size()}")
        entries[key], ends = (header, 8 + length + start), max(ends, end)
    if size != 8 + length + ends:
        raise ValueError(f"the file has {size} bytes, its tensors need {8 + length + ends}")
    return entries, metadata
