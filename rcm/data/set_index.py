"""Where the members of all shards of a folder lie, in one file, so that a set of ten million
samples opens in seconds and takes no memory that grows with it.

    dataset.index    magic; per shard a block of rows int64 [N, 2 + 2 fields] (first byte and length
                     of the key; offset and length of each member) and its keys with a space
                     between two; directory (JSON: one line of facts per shard); footer

Rows and keys are read where they are asked for. A shard is believed to be the one that was recorded
while its size and times of change are those of the record; where only its times differ (it was
copied, or written as the record was) its contents decide (`content_digest`). Any other is looked at
by itself (`index_shard`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import struct
import tarfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from loguru import logger

from rcm.core.errors import CheckpointError, first_line
from rcm.core.files import discard, sole_writer, writing
from rcm.data.tar_index import (
    CONTEXT,
    FIELDS,
    Shard,
    ShardError,
    ShardIndex,
    content_digest,
    index_shard,
)
from rcm.storage.json_file import parse_json

RECORD = "dataset.index"
MANY = 64
"""Shards of a set from which on a record is worth its while."""

_MAGIC = b"rcm dataset index 1\n"
_FOOTER = struct.Struct("<qq32s")  # first byte and length of the directory, its SHA-256
_SETTLED = 2 * 10**9
"""Nanoseconds that a shard must be older than its record: file systems count time in steps."""
_THREADS = 16
_AT_ONCE, _IN_HAND = 1024, 16

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the directory says of a shard: its block is at `at`, `keys` bytes of keys stand last."""

    name: str
    size: int
    changed: int  # ns, the later of its two times of change
    digest: str
    count: int
    num_fields: int
    at: int
    keys: int

    @property
    def rows(self) -> int:
        return 8 * self.count * (2 + 2 * self.num_fields)

    def fit(self, *, before: int) -> bool:
        """Whether they are of a shard whose block ends before byte `before`."""
        numbers = (self.size, self.changed, self.count, self.num_fields, self.at, self.keys)
        return (
            all(type(number) is int and number >= 0 for number in numbers)
            and isinstance(self.name, str)
            and self.count > 0
            and self.num_fields in (len(FIELDS), len(FIELDS) + 1)
            and self.at + self.rows + self.keys <= before
        )


class Record:
    """The recorded index of a folder, open: facts by shard name, and `read` for what is between."""

    def __init__(self, path: Path) -> None:
        """OSError, or CheckpointError for a file that is damaged."""
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        least = len(_MAGIC) + _FOOTER.size
        if size < least or self.read(0, len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{path} is no index of this version")
        at, length, digest = _FOOTER.unpack(self.read(size - _FOOTER.size, _FOOTER.size))
        if at < len(_MAGIC) or length < 0 or at + length + _FOOTER.size != size:
            raise CheckpointError(f"{path} was cut")
        text = self.read(at, length)
        if hashlib.sha256(text).digest() != digest:
            raise CheckpointError(f"{path} was damaged")
        found = parse_json(text, source=path)
        self.recorded: int = found["recorded"]
        self.facts = {row[0]: _Facts(*row) for row in found["shards"]}
        told = self.facts.values()
        if type(self.recorded) is not int or not all(facts.fit(before=at) for facts in told):
            raise CheckpointError(f"{path} holds facts that are none")

    def read(self, at: int, length: int) -> bytes:
        """Bytes of the file; CheckpointError where it ends."""
        found = os.pread(self._file, length, at)
        if len(found) != length:
            raise CheckpointError(f"{self.path} ends at byte {at + len(found)}; it was cut")
        return found

    def believes(self, facts: _Facts, path: Path) -> bool | None:
        """Whether size and times say that the file is this shard; None: compare the contents."""
        now = os.stat(path)
        if now.st_size != facts.size:
            return False
        same = max(now.st_mtime_ns, now.st_ctime_ns) == facts.changed
        return True if same and facts.changed < self.recorded - _SETTLED else None


class RecordedShard(Shard):
    """A shard whose places are read from a `Record` when asked for; memory holds no samples."""

    __slots__ = ("_facts", "_folder", "_record")

    def __init__(self, record: Record, facts: _Facts, folder: Path) -> None:
        self._record, self._facts, self._folder = record, facts, folder

    @property
    def path(self) -> Path:  # type: ignore[override]
        return self._folder / self._facts.name

    @property
    def size(self) -> int:  # type: ignore[override]
        return self._facts.size

    @property
    def digest(self) -> str:  # type: ignore[override]
        return self._facts.digest

    @property
    def fields(self) -> tuple[str, ...]:
        return (*FIELDS, CONTEXT)[: self._facts.num_fields]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all samples, read now."""
        return tuple(self.key(sample) for sample in range(len(self)))

    @property
    def spans(self) -> np.ndarray:
        """(offset, length) of all members, int64 [N, fields, 2], read now."""
        return np.frombuffer(self.rows(), "<i8").reshape(len(self), -1, 2)[:, 1:].copy()

    def __len__(self) -> int:
        return self._facts.count

    def key(self, sample: int) -> str:
        """As `Shard.key`; ShardError where the record is damaged."""
        start, length = self._row(sample, 0)
        if not 0 <= start <= start + length <= self._facts.keys:
            raise self._damaged(sample)
        text = self._record.read(self._facts.at + self._facts.rows + start, length)
        return text.decode(errors="surrogateescape")

    def span(self, sample: int, field: int) -> tuple[int, int]:
        """As `Shard.span`; ShardError where the record is damaged."""
        offset, length = self._row(sample, 1 + field)
        if not (offset >= tarfile.BLOCKSIZE and 0 <= length <= self.size - offset):
            raise self._damaged(sample)
        return offset, length

    def joined_keys(self) -> bytes:
        return self._record.read(self._facts.at + self._facts.rows, self._facts.keys)

    def rows(self) -> bytes:
        """Its rows as they are recorded."""
        return self._record.read(self._facts.at, self._facts.rows)

    def _row(self, sample: int, pair: int) -> tuple[int, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)} in shard {self.path}")
        width = 16 * (1 + self._facts.num_fields)
        first, second = struct.unpack(
            "<qq", self._record.read(self._facts.at + width * sample + 16 * pair, 16)
        )
        return first, second

    def _damaged(self, sample: int) -> ShardError:
        return ShardError(
            f"shard {self.path}: the entry of sample {sample} in {self._record.path} is damaged;"
            f" delete that file, or record it anew: {how_to_record(self._folder)}"
        )


Place = ShardIndex | RecordedShard
"""A shard, wherever its places are kept."""


def how_to_record(folder: Path) -> str:
    """The command line that records the index of a folder."""
    return f"rcm data index {shlex.quote(f'{folder}/*.tar')}"


def open_shards(paths: Sequence[Path]) -> list[Place]:
    """Shards in the order of their paths: from the records of their folders, else each by itself.

    Raises `ShardError` for a damaged shard, OSError for one that cannot be read. What a start would
    gain from is said in a warning.
    """
    records = {folder: _record_of(folder) for folder in dict.fromkeys(p.parent for p in paths)}

    def tell(*these: list[Path]) -> None:
        for folder, record in records.items():
            known = {} if record is None else record.facts
            _warn(folder, known, *([p for p in some if p.parent == folder] for some in these))

    return _opened(paths, records, alone=index_shard, tell=tell)


def _opened(
    paths: Sequence[Path],
    records: Mapping[Path, Record | None],
    *,
    alone: Callable[[Path], ShardIndex],
    tell: Callable[[list[Path], list[Path]], None] = lambda *_: None,
) -> list[Place]:
    """The shards; `alone` opens those that no record knows. Before that, `tell` is given the paths
    of these, and of those whose contents had to be compared.
    """
    compared: list[Path] = []

    def look(path: Path) -> Place | None:
        record = records[path.parent]
        facts = None if record is None else record.facts.get(path.name)
        if record is None or facts is None:
            return None
        believed = record.believes(facts, path)
        if believed is None:
            compared.append(path)
            believed = content_digest(path) == facts.digest
        return RecordedShard(record, facts, path.parent) if believed else None

    found = list(each(look, paths))
    unknown = [path for path, shard in zip(paths, found, strict=True) if shard is None]
    tell(unknown, compared)
    looked_at = each(alone, unknown)
    return [next(looked_at) if shard is None else shard for shard in found]


def each(look: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[Found]:
    """`look(item)` of all items in order; the first failure in that order is raised. Many at a
    time: a file system over a network answers slowly, but many questions at once.
    """
    if len(items) < MANY:
        yield from map(look, items)
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="rcm-look") as pool:
        for start in range(0, len(items), _AT_ONCE):
            some = items[start : start + _AT_ONCE]
            hands = [some[first : first + _IN_HAND] for first in range(0, len(some), _IN_HAND)]
            for found in pool.map(lambda hand: [look(item) for item in hand], hands):
                yield from found


def _record_of(folder: Path) -> Record | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return Record(path)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "{} is not used ({}); its shards are looked at one by one. Record it anew: {}",
            path,
            first_line(error),
            how_to_record(folder),
        )
        return None


def _warn(folder: Path, known: dict[str, _Facts], alone: list[Path], compared: list[Path]) -> None:
    """Say what is slow about a start, and the command that mends it."""
    if other := [path for path in alone if path.name in known]:
        told = (
            f"{len(other)} shards of {folder} are others than its {RECORD} says (the first is"
            f" {other[0].name}), and are looked at one by one"
        )
    elif len(alone) >= MANY:
        told = f"{len(alone)} shards of {folder} are in no {RECORD}, and are looked at one by one"
    elif len(compared) >= MANY:
        told = (
            f"{len(compared)} shards of {folder} are as old as its {RECORD} or were copied since:"
            " their contents were compared"
        )
    else:
        return
    logger.warning("{}, at every start of every rank. Record it: {}", told, how_to_record(folder))


def record_shards(folder: Path, paths: Iterable[Path]) -> tuple[int, int]:
    """Write the index of the shards `paths`, all in `folder`, whole or not at all; returns the
    numbers of shards and samples. What an older record or an index beside a shard knows is taken
    over. Raises as `open_shards`, and OSError where the folder cannot be written to.
    """
    paths, records = sorted(paths), {folder: _record_of(folder)}

    def looked_at() -> Iterator[tuple[os.stat_result, Place]]:
        for start in range(0, len(paths), _AT_ONCE):
            part = paths[start : start + _AT_ONCE]
            # before the shards are read: one that changes meanwhile is not believed later
            stats = [os.stat(path) for path in part]
            yield from zip(stats, _opened(part, records, alone=_kept), strict=True)

    return write_record(folder, looked_at())


def _kept(path: Path) -> ShardIndex:
    """A shard by itself; what a scan finds is kept beside it, so that a long one can be stopped."""
    return index_shard(path, keep=True)


def write_record(folder: Path, shards: Iterable[tuple[os.stat_result, Place]]) -> tuple[int, int]:
    """As `record_shards`, of shards that were opened already, each with the `stat` of its file."""
    temporary, target = folder / f".{RECORD}.partial", folder / RECORD
    facts: list[list[object]] = []
    samples = 0
    with (
        writing(target, "cannot write the index", own=(temporary, target)),
        sole_writer(temporary, wait=True) as file,
    ):
        file.write(_MAGIC)
        file.flush()
        recorded = os.fstat(file.fileno()).st_mtime_ns
        for stat, shard in shards:
            at, keys = file.tell(), shard.joined_keys()
            file.write(shard.rows() if isinstance(shard, RecordedShard) else _rows(shard))
            file.write(keys)
            changed, samples = max(stat.st_mtime_ns, stat.st_ctime_ns), samples + len(shard)
            told = (shard.path.name, shard.size, changed, shard.digest)
            facts.append([*told, len(shard), len(shard.fields), at, len(keys)])
        text = json.dumps({"recorded": recorded, "shards": facts}).encode()
        at = file.tell()
        file.write(text)
        file.write(_FOOTER.pack(at, len(text), hashlib.sha256(text).digest()))
        file.flush()
        os.fsync(file.fileno())
        if target.is_dir():
            discard(target)
        os.replace(temporary, target)
    return len(facts), samples


def _rows(shard: ShardIndex) -> bytes:
    """Rows of a shard whose places are in memory."""
    lengths = np.array(
        [len(shard.key(i).encode(errors="surrogateescape")) for i in range(len(shard))]
    )
    starts = np.cumsum(lengths + 1) - lengths - 1
    keys = np.stack([starts, lengths], axis=1).reshape(-1, 1, 2)
    return np.concatenate([keys, shard.spans], axis=1).astype("<i8").tobytes()
