"""The safetensors format: an 8-byte length, a JSON header of names, dtypes, shapes and places, then
the bytes of the tensors.

The official library judges a file first; it does not tell where tensors are, and its own loading
maps the file privately, which counts as memory, so places are read here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rcm.core.errors import CheckpointError, first_line
from rcm.core.files import read_exactly
from rcm.storage.json_file import parse_json

MOST_HEADER = 100_000_000
"""Bytes of a header; the library's limit."""

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
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def read_header(path: Path) -> tuple[dict[str, tuple[Tensor, int]], dict[str, str]]:
    """Key -> (meta tensor, first byte) of a safetensors file, and its metadata, once the tensors
    are seen to fill the file in order.

    Raises `CheckpointError` for a file that is truncated, damaged or of another format.
    """
    try:
        return _parsed(path)
    except Exception as error:
        reason = str(error) if isinstance(error, CheckpointError) else first_line(error)
        raise CheckpointError(
            f"{path} cannot be read ({reason}); it is damaged, truncated or not a safetensors file:"
            " copy or download it again"
        ) from error


def read_entry(path: Path, header: Tensor, start: int) -> Tensor:
    """The bytes from `start` on as a CPU tensor like `header`; `OSError` if too few."""
    flat = torch.empty(header.numel() * header.element_size(), dtype=torch.uint8)
    read_exactly(path, flat.numpy().data, start=start)
    return flat.view(header.dtype).view(header.shape)


def write_safetensors(
    path: Path,
    headers: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file of the entries in `headers` (meta tensors), each fetched with `read` when
    its turn comes; flushed to disk.

    Wide dtypes come first, so that every entry is aligned to its element size.
    """
    order = sorted(headers, key=lambda key: -headers[key].element_size())
    listed: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        start, end = end, end + headers[key].nbytes
        listed[key] = {
            "dtype": _NAMES[headers[key].dtype],
            "shape": list(headers[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(listed).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = read(key).contiguous().cpu()
            if tensor.shape != headers[key].shape or tensor.dtype != headers[key].dtype:
                raise ValueError(
                    f"{key} was announced as {headers[key].dtype} {tuple(headers[key].shape)}, came"
                    f" as {tensor.dtype} {tuple(tensor.shape)}"
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _parsed(path: Path) -> tuple[dict[str, tuple[Tensor, int]], dict[str, str]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER):
            raise ValueError(
                f"its header should have {length} bytes, the file has {size}; at most {MOST_HEADER}"
                " are read"
            )
        listed = parse_json(file.read(length), source="its header")
    with safe_open(path, framework="np"):  # the library's own checks of the header
        pass
    metadata = listed.pop("__metadata__", {})
    places = sorted(
        (_entry(key, entry) for key, entry in listed.items()), key=lambda place: place[2:]
    )
    entries, begin, end = {}, 8 + length, 0
    for key, header, start, stop in places:
        if start != end:
            raise ValueError(f"{key} begins at byte {start}, the tensor before it ends at {end}")
        entries[key], end = (header, begin + start), stop
    if size != begin + end:
        raise ValueError(f"the file has {size} bytes, its tensors need {begin + end}")
    return {key: entries[key] for key in listed}, metadata


def _entry(key: str, entry: dict[str, Any]) -> tuple[str, Tensor, int, int]:
    """(key, meta tensor, first byte, byte after the last) of an entry of the header."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"{key} has the unknown dtype {dtype}")
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError(f"{key} has an impossible shape or place")
    needed = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
    if end - start != needed:
        raise ValueError(f"{key} has {end - start} bytes, its shape needs {needed}")
    return key, torch.empty(shape, dtype=SAFETENSORS_DTYPES[dtype], device="meta"), start, end
