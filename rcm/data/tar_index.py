"""Where each member of a tar shard lies, by its headers alone: any sample is read by one seek.

Reading by index is what makes a resumed run exact: the order is a permutation over samples, and a
position in it is one number. The layout stays that of the webdataset format (members of a sample
share the key before the first dot and stand together), which webdataset itself reads. What macOS
adds to archives (`._*`, `.DS_Store`, `__MACOSX`) is no sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from rcm.core.errors import first_line
from rcm.core.files import discard, write_atomically

FIELDS = ("latent.pt", "embed.pt", "prompt.txt")
CONTEXT = "context.pt"
"""Further member of trajectory shards whose clean end is not the data (TF-KD): the data's latents;
in all samples of a shard or in none.
"""

INDEX_SUFFIX = ".index.json"
_NO_INDEX = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_END = bytes(2 * tarfile.BLOCKSIZE)
_WHOLE, _BLOCK, _BLOCKS = 1 << 24, 1 << 14, 64
_LONGEST_NAME = 100


class ShardError(RuntimeError):
    """A shard is truncated, damaged or incomplete; the message names the shard and the member."""


class Shard(ABC):
    """One shard of N samples, wherever their places are kept: `path`, `size` in bytes, `digest` of
    its contents (see `content_digest`).
    """

    path: Path
    size: int
    digest: str

    @property
    @abstractmethod
    def fields(self) -> tuple[str, ...]:
        """Members of every sample: `FIELDS`, and `CONTEXT` where the shard has it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, sample: int) -> str:
        """Key of a sample."""

    @abstractmethod
    def span(self, sample: int, field: int) -> tuple[int, int]:
        """(offset, length) of member `fields[field]` of a sample."""

    @abstractmethod
    def joined_keys(self) -> bytes:
        """All keys, a space between two."""

    def read(self, sample: int, field: int) -> bytes:
        """Bytes of member `fields[field]` of a sample; `ShardError` if the file ends early, or if
        another member stands there by now.
        """
        return bytes(self.read_members(sample, (field,))[0])

    def read_members(self, sample: int, fields: Iterable[int]) -> list[bytearray]:
        """As `read`, of several members of one sample: the file is opened once."""
        with open(self.path, "rb") as file:
            return [self._read(file, sample, field) for field in fields]

    def _read(self, file: BufferedReader, sample: int, field: int) -> bytearray:
        offset, length = self.span(sample, field)
        header, data = bytearray(tarfile.BLOCKSIZE), bytearray(length)
        file.seek(offset - tarfile.BLOCKSIZE)
        whole = file.readinto(header) == len(header)
        if not whole or not _is_header_of(header, self.member(sample, field), length):
            raise ShardError(
                f"shard {self.path}: member {self.member(sample, field)} is not where it was found"
                " before; the file was changed or damaged"
            )
        if (found := file.readinto(data)) != length:
            raise ShardError(
                f"shard {self.path}: member {self.member(sample, field)} has {found} of"
                f" {length} bytes; the file was truncated"
            )
        return data

    def member(self, sample: int, field: int) -> str:
        """Name of a member, for messages."""
        return f"{self.key(sample)}.{self.fields[field]}"


@dataclass(frozen=True)
class ShardIndex(Shard):
    """A shard whose places are in memory: `keys` of its N samples, `spans` int64 [N, fields, 2]:
    (offset, length) of members `fields`.
    """

    path: Path
    size: int
    keys: tuple[str, ...]
    spans: np.ndarray
    digest: str

    @property
    def fields(self) -> tuple[str, ...]:
        return (*FIELDS, CONTEXT)[: self.spans.shape[1]]

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        return self.keys[sample]

    def span(self, sample: int, field: int) -> tuple[int, int]:
        offset, length = self.spans[sample, field].tolist()
        return offset, length

    def joined_keys(self) -> bytes:
        return " ".join(self.keys).encode(errors="surrogateescape")


def index_shard(path: Path, *, keep: bool = False) -> ShardIndex:
    """Index of a shard: from the file beside it if made from a shard of these contents
    (`content_digest`), else from the headers, and with `keep` stored there.
    """
    beside = _beside(path)
    if beside.is_file():
        size, digest = path.stat().st_size, content_digest(path)
        try:
            stored = json.loads(beside.read_text())
            if stored["size"] == size and stored.get("digest") == digest:
                return ShardIndex(path, size, tuple(stored["keys"]), _spans(stored, size), digest)
            logger.warning(f"index {beside} is of another version of its shard; scanning the shard")
        except _NO_INDEX as error:
            logger.warning(
                f"index {beside} is unreadable ({first_line(error)}); scanning the shard"
            )
    found = scan_shard(path)
    if keep:
        write_index(found)
    return found


def content_digest(path: Path) -> str:
    """Hash of size and bytes: all up to 16 MiB, else 64 blocks of 16 KiB spread over the file."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def _spans(stored: Mapping[str, Any], size: int) -> np.ndarray:
    """A stored index's spans; `ValueError` unless they lie within `size` bytes, keys unique."""
    keys, fields = stored["keys"], stored["fields"]
    if (
        fields not in (list(FIELDS), [*FIELDS, CONTEXT])
        or not keys
        or not all(isinstance(key, str) for key in keys)
    ):
        raise ValueError("its fields or keys are none")
    spans = np.asarray(stored["spans"], dtype=np.int64).reshape(len(keys), len(fields), 2)
    inside = (
        (spans[..., 0] >= tarfile.BLOCKSIZE)
        & (spans[..., 1] >= 0)
        & (spans[..., 1] <= size - spans[..., 0])
    )
    if len(set(keys)) != len(keys) or not inside.all():
        raise ValueError("its members lie outside of the shard, or its keys repeat")
    return spans


def _is_header_of(header: bytes | bytearray, name: str, length: int) -> bool:
    """Whether a tar header announces this member; names too long for it are not compared."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return info.size == length and (
        len(os.fsencode(name)) > _LONGEST_NAME
        or os.path.basename(info.name) == os.path.basename(name)
    )


def write_index(index: ShardIndex) -> Path:
    """Store an index beside its shard, atomically, to spare later scans; returns its path."""
    beside = _beside(index.path)
    record = {
        "size": index.size,
        "digest": index.digest,
        "fields": list(index.fields),
        "keys": list(index.keys),
        "spans": index.spans.reshape(-1).tolist(),
    }
    if beside.is_dir():
        discard(beside)
    write_atomically(beside, json.dumps(record))
    return beside


def scan_shard(path: Path) -> ShardIndex:
    """Index of a shard from its tar headers. Raises `ShardError` for a truncated or damaged
    archive, an incomplete sample, or a doubled member.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    last, reached = "(none)", 0
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if info.offset_data <= reached or info.size < 0:
                    raise ShardError(f"shard {path}: the header of {info.name} leads backwards")
                reached = info.offset_data
                if not info.isfile() or _is_of_macos(info.name):
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
        raise ShardError(
            f"shard {path} is not a whole uncompressed tar: {error}; last good member {last}"
        ) from error
    _check_end(path, end, last=last)
    fields = (*FIELDS, CONTEXT) if any(CONTEXT in members for members in found.values()) else FIELDS
    for key, members in found.items():
        missing = [field for field in fields if field not in members]
        if missing:
            raise ShardError(
                f"shard {path}: sample {key} lacks {', '.join(f'{key}.{m}' for m in missing)}, it"
                f" has {', '.join(sorted(members))}"
            )
    if not found:
        raise ShardError(f"shard {path} holds no samples")
    places = [[members[field] for field in fields] for members in found.values()]
    spans = np.array(places, dtype=np.int64)
    return ShardIndex(path, path.stat().st_size, tuple(found), spans, content_digest(path))


def _is_of_macos(name: str) -> bool:
    base = os.path.basename(name)
    return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in name.split("/")


def _check_end(path: Path, end: int, *, last: str) -> None:
    """Look for the end marker, and that nothing follows it: tarfile takes a damaged header, or one
    in a hole, for the end of the archive.
    """
    with open(path, "rb") as file:
        file.seek(end)
        marker = file.read(len(_END))
        while marker == _END and (rest := file.read(1 << 20)):
            if rest.count(0) < len(rest):
                raise ShardError(
                    f"shard {path} goes on after its end (byte {end} of {path.stat().st_size},"
                    f" after member {last}): there is a hole in it, or two archives were joined"
                )
    if marker != _END:
        state = (
            "the file was truncated" if len(marker) < len(_END) else "the next header is damaged"
        )
        raise ShardError(
            f"shard {path} does not end after member {last} (byte {end} of {path.stat().st_size}):"
            f" {state}"
        )


def _beside(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)
