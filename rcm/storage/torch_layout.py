"""Where torch's two formats keep the pickle of a value and the bytes of its storages: a zip archive
with checksums; before torch 1.6, five pickles and then the storages after their sizes.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from rcm.storage.inert_pickle import MOST_BYTES, read_inert

LOCAL_HEADER = b"PK\x03\x04"
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file; `crc`: what the archive states of them, 0 for nothing."""

    start: int
    length: int
    crc: int = 0

    def require_intact(self, content: bytes | memoryview, what: str) -> None:
        if self.crc and zlib.crc32(content) != self.crc:
            raise zipfile.BadZipFile(f"the bytes of {what} are not those of its checksum")


NOWHERE = Place(0, 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one storage: those of key `key`, `count` elements of `dtype`."""

    key: str
    dtype: torch.dtype
    count: int


class Held(io.RawIOBase):
    """Bytes in memory as a file; io.BytesIO would copy them."""

    def __init__(self, content: bytearray) -> None:
        self.content, self.at = memoryview(content), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, len(self.content))[whence])
        return self.at

    def readinto(self, target: Any) -> int:
        part = self.content[self.at : self.at + len(target)]
        target[: len(part)] = part
        self.at += len(part)
        return len(part)


def read_archive(
    file: BinaryIO, *, names: Collection[str], storages: Callable[[Any], Piece]
) -> tuple[Any, dict[str, Place]]:
    """The value of an archive (arguments as `read_inert`), and where its storages are, by key. A
    file with a hole in the middle is found here.
    """
    if not zipfile.is_zipfile(file):
        raise zipfile.BadZipFile("the end of the archive is missing")
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
    places: dict[str, Place] = {}
    for entry, following in zip(entries, ends, strict=True):
        head = _bytes(file, Place(entry.header_offset, 30))
        name_size, extra_size = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
        name = file.read(name_size).decode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        start = entry.header_offset + 30 + name_size + extra_size
        there = head[:4] == LOCAL_HEADER and name == entry.orig_filename
        if not there or start + entry.compress_size > following:
            raise zipfile.BadZipFile(f"entry {entry.filename} is not where the directory says")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(
                f"entry {entry.filename} is compressed, which torch does not do"
            )
        inner = name.partition("/")[2]
        if inner in places:
            raise zipfile.BadZipFile(f"entry {entry.filename} occurs twice")
        places[inner] = Place(start, entry.file_size, entry.CRC)
    if "data.pkl" not in places:
        raise zipfile.BadZipFile("it has no data.pkl; another kind of archive")
    if _bytes(file, places.get("byteorder", NOWHERE)) not in (b"little", b""):
        raise ValueError("its numbers are not little-endian")
    if places["data.pkl"].length > MOST_BYTES:
        raise ValueError(f"its data.pkl has more than {MOST_BYTES} bytes")
    content = _bytes(file, places["data.pkl"])
    places["data.pkl"].require_intact(content, "data.pkl")
    value = read_inert(io.BytesIO(content), names=names, storages=storages)
    lead = "data/"
    return value, {k.removeprefix(lead): at for k, at in places.items() if k.startswith(lead)}


def read_old_format(
    file: BinaryIO, *, names: Collection[str], storages: Callable[[Any], Piece]
) -> tuple[Any, dict[str, Place]]:
    """As `read_archive`, of torch's first format: five pickles, then storages after their sizes."""
    if read_inert(file, names=()) != _OLD_MAGIC:
        raise ValueError("it does not begin as a torch file does")
    if read_inert(file, names=()) != _OLD_VERSION:
        raise ValueError("it has another version of torch's first format")
    if read_inert(file, names=()).get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    pieces: dict[str, Piece] = {}

    def noted(pid: Any) -> Piece:
        piece = storages(pid)
        if pieces.setdefault(piece.key, piece) != piece:
            raise ValueError(f"it states storage {piece.key} in two ways")
        return piece

    value = read_inert(file, names=names, storages=noted)
    places: dict[str, Place] = {}
    for key in map(_word, read_inert(file, names=())):
        piece, stated = pieces[key], file.read(8)
        length = piece.count * piece.dtype.itemsize
        places[key] = Place(file.tell(), length)
        # All eight bytes: what is left of a size that was cut can be equal, as of an empty storage
        whole = stated == piece.count.to_bytes(8, "little")
        if not whole or file.seek(length, io.SEEK_CUR) > file.seek(0, io.SEEK_END):
            raise ValueError(f"storage {key} is incomplete")
        file.seek(places[key].start + length)
    if file.read(1):
        raise ValueError("there are bytes after its last storage")
    return value, places


def _word(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError("it lists a storage whose key is no word")
    return key


def _bytes(file: BinaryIO, place: Place) -> bytes:
    file.seek(place.start)
    return file.read(place.length)
