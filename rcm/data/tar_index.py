"""Where each member of a tar shard lies, found from its headers alone, so that any sample can be read with one seek.

Reading by index is what makes a resumed run exact: the order is a permutation over samples, and a position in it is one number. The
layout stays that of the webdataset format (members of a sample share the key before the first dot and stand together), which webdataset
itself reads.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loguru import logger

FIELDS = ("latent.pt", "embed.pt", "prompt.txt")
CONTEXT = "context.pt"
"""Further member of trajectory shards whose clean end is not the data (TF-KD): the data's latents; in all samples of a shard or in none."""

INDEX_SUFFIX = ".index.json"
_END = bytes(2 * tarfile.BLOCKSIZE)


class ShardError(RuntimeError):
    """A shard is truncated, damaged or incomplete; the message names the shard and the member."""


@dataclass(frozen=True)
class ShardIndex:
    """One shard: `path`, `size` in bytes, `keys` of its N samples, `spans` int64 [N, fields, 2]: (offset, length) of members `fields`."""

    path: Path
    size: int
    keys: tuple[str, ...]
    spans: np.ndarray

    @property
    def fields(self) -> tuple[str, ...]:
        """Members of every sample: `FIELDS`, and `CONTEXT` where the shard has it."""
        return (*FIELDS, CONTEXT)[: self.spans.shape[1]]

    def read(self, sample: int, field: int) -> bytes:
        """Bytes of member `fields[field]` of a sample; `ShardError` if the file ends early."""
        offset, length = (int(x) for x in self.spans[sample, field])
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise ShardError(
                f"shard {self.path}: member {self.member(sample, field)} has {len(data)} of {length} bytes; the file was truncated"
            )
        return data

    def member(self, sample: int, field: int) -> str:
        """Name of a member, for messages."""
        return f"{self.keys[sample]}.{self.fields[field]}"


def index_shard(path: Path) -> ShardIndex:
    """Index of a shard: from the file beside it if that is of this shard (its size, and not older than it), else from the tar headers."""
    size, beside = path.stat().st_size, _beside(path)
    known = [list(FIELDS), [*FIELDS, CONTEXT]]
    if beside.is_file():
        try:
            stored = json.loads(beside.read_text())
            if beside.stat().st_mtime_ns < path.stat().st_mtime_ns or stored["size"] != size or stored["fields"] not in known:
                logger.warning(f"index {beside} is of an older version of its shard; scanning the shard")
            else:
                spans = np.asarray(stored["spans"], dtype=np.int64).reshape(len(stored["keys"]), len(stored["fields"]), 2)
                return ShardIndex(path, size, tuple(stored["keys"]), spans)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning(f"index {beside} is unreadable ({error}); scanning the shard")
    return scan_shard(path)


def write_index(index: ShardIndex) -> Path:
    """Store an index beside its shard (atomically), to spare later runs the scan; returns its path."""
    beside = _beside(index.path)
    record = {"size": index.size, "fields": list(index.fields), "keys": list(index.keys), "spans": index.spans.reshape(-1).tolist()}
    temporary = beside.with_name(f".{beside.name}.partial")
    temporary.write_text(json.dumps(record))
    os.replace(temporary, beside)
    return beside


def scan_shard(path: Path) -> ShardIndex:
    """Index of a shard from its tar headers. Raises `ShardError` for a truncated or damaged archive, an incomplete sample, or a doubled
    member.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    last = "(none)"
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if not info.isfile():
                    continue
                last = info.name
                key, _, field = os.path.basename(info.name).partition(".")
                key = os.path.join(os.path.dirname(info.name), key)
                members = found.setdefault(key, {})
                if field in members:
                    raise ShardError(f"shard {path}: member {info.name} appears twice")
                members[field] = (info.offset_data, info.size)
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"shard {path} is not a whole uncompressed tar: {error}; last good member {last}") from error
    _check_end(path, end, last=last)
    fields = (*FIELDS, CONTEXT) if any(CONTEXT in members for members in found.values()) else FIELDS
    for key, members in found.items():
        missing = [field for field in fields if field not in members]
        if missing:
            raise ShardError(
                f"shard {path}: sample {key} lacks {', '.join(f'{key}.{m}' for m in missing)}, it has {', '.join(sorted(members))}"
            )
    if not found:
        raise ShardError(f"shard {path} holds no samples")
    spans = np.array([[members[field] for field in fields] for members in found.values()], dtype=np.int64)
    return ShardIndex(path, path.stat().st_size, tuple(found), spans)


def _check_end(path: Path, end: int, *, last: str) -> None:
    """tarfile takes a damaged header for the end of the archive, so look for the end marker itself."""
    with open(path, "rb") as file:
        file.seek(end)
        marker = file.read(len(_END))
    if marker != _END:
        state = "the file was truncated" if len(marker) < len(_END) else "the next header is damaged"
        raise ShardError(f"shard {path} does not end after member {last} (byte {end} of {path.stat().st_size}): {state}")


def _beside(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)
