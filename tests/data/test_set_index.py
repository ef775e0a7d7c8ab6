"""The recorded index of a folder: the same samples as the shards themselves give, without looking
at them, and never believed for other shards than it was made from.
"""

from __future__ import annotations

import io
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger

from rcm.data import set_index
from rcm.data.latents import LatentShards
from rcm.data.loader import Loader
from rcm.data.set_index import MANY, RECORD, record_shards, write_record
from rcm.data.shard_writer import ShardSample, build_shards, shard_name, write_shard
from rcm.data.tar_index import INDEX_SUFFIX, ShardError, ShardIndex, scan_shard
from scripts.shards import main as shards_main

NUM = 5


def samples(first: int, *, count: int = NUM, context: bool = False) -> list[ShardSample]:
    draw = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()  # noqa: E731
    shape = (2, 4, 3, 2, 2) if context else (4, 3, 2, 2)
    clean = draw(9, 4, 3, 2, 2) if context else None
    return [ShardSample(draw(first + i, *shape), draw(first + i + 100, 5, 6), f"prompt {first + i} ö", clean) for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(3):
        write_shard(tmp_path / shard_name(shard), samples(NUM * shard), first_key=NUM * shard)
    return tmp_path


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards count as older than their record, as they are after two seconds."""
    monkeypatch.setattr(set_index, "_SETTLED", -(10**15))


@pytest.fixture
def warned():
    text = io.StringIO()
    number = logger.add(text, format="{message}")
    yield text
    logger.remove(number)


def opened(folder: Path) -> LatentShards:
    return LatentShards(f"{folder}/*.tar")


def recorded(folder: Path) -> Path:
    record_shards(folder, folder.glob("*.tar"))
    return folder / RECORD


def same(one: LatentShards, other: LatentShards) -> bool:
    first, second = one.fetch(range(len(one))), other.fetch(range(len(other)))
    return (
        torch.equal(first.latents, second.latents)
        and torch.equal(first.text, second.text)
        and (first.keys, first.prompts, one.fingerprint()) == (second.keys, second.prompts, other.fingerprint())
    )


@pytest.mark.parametrize("context", [False, True])
def test_a_record_gives_what_the_shards_give_and_no_shard_is_looked_at(folder, old, monkeypatch, context):
    write_shard(folder / shard_name(7), samples(90, count=2, context=True), first_key=90)
    if not context:
        (folder / shard_name(7)).unlink()
    else:
        for number in range(3):
            (folder / shard_name(number)).unlink()
    plain = opened(folder)
    recorded(folder)
    for name in ("content_digest", "index_shard"):
        monkeypatch.setattr(set_index, name, None)
    found = opened(folder)
    assert same(plain, found) and list(plain.captions()) == list(found.captions())
    for one, other in zip(plain.shards, found.shards, strict=True):
        assert one.keys == other.keys and np.array_equal(one.spans, other.spans)
        assert (one.fields, one.size, one.digest, one.path) == (other.fields, other.size, other.digest, other.path)
    with pytest.raises(IndexError):
        found.shards[0].key(len(found.shards[0]))


def test_keys_of_any_kind(folder, old):
    """Spaces, other alphabets, bytes that are no text."""
    path = folder / shard_name(0)
    index = scan_shard(path)
    odd = ("a b", "", "é/ü", "x\udcff", "c")
    write_record(folder, [(os.stat(path), ShardIndex(path, index.size, odd, index.spans, index.digest))])
    (shard,) = set_index.open_shards([path])
    assert shard.keys == odd and shard.joined_keys() == " ".join(odd).encode(errors="surrogateescape")


def _other_bytes(folder: Path) -> None:
    """Of the same size, and of the same date of writing."""
    path = folder / shard_name(1)
    before = path.stat()
    path.write_bytes((folder / shard_name(2)).read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _swapped(folder: Path) -> None:
    held = folder / "held"
    (folder / shard_name(0)).rename(held)
    (folder / shard_name(1)).rename(folder / shard_name(0))
    held.rename(folder / shard_name(1))


CHANGES = {
    "other bytes": (_other_bytes, "1 shards of .* are others than its dataset.index says .the first is shard-000001"),
    "swapped": (_swapped, "2 shards of .* are others"),
    "written again": (lambda f: write_shard(f / shard_name(2), samples(40, count=2), first_key=40), "1 shards of .* are others"),
    "one more": (lambda f: write_shard(f / shard_name(3), samples(40), first_key=40), ""),
    "one fewer": (lambda f: (f / shard_name(0)).unlink(), ""),
    "touched": (lambda f: os.utime(f / shard_name(0)), ""),
    "cut": (lambda f: (f / RECORD).write_bytes((f / RECORD).read_bytes()[:-9]), "dataset.index is not used .*was cut"),
    "empty": (lambda f: (f / RECORD).write_bytes(b""), "is not used .*no index of this version"),
    "another file": (lambda f: (f / RECORD).write_bytes(b"x" * 999), "is not used .*no index of this version"),
    "one letter": (lambda f: (f / RECORD).write_bytes((f / RECORD).read_bytes().replace(b"shard-000001", b"shard-000009")), "damaged"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_record_is_believed_for_its_own_shards_only(folder, old, warned, name):
    change, told = CHANGES[name]
    recorded(folder)
    change(folder)
    found = opened(folder)
    words = warned.getvalue()
    (folder / RECORD).unlink()
    assert same(found, opened(folder))
    assert bool(words) == bool(told)
    assert not told or (re.search(told, words) and "rcm data index " in words)


def test_shards_as_young_as_their_record_are_compared(folder, monkeypatch):
    """A change within a step of the file system's clock would leave size and date as they are."""
    recorded(folder)
    compared = []
    look = set_index.content_digest
    monkeypatch.setattr(set_index, "content_digest", lambda path: compared.append(path) or look(path))
    opened(folder)
    assert len(compared) == 3


def test_a_damaged_entry_is_named(folder, old):
    record = recorded(folder)
    data = bytearray(record.read_bytes())
    at = len(b"rcm dataset index 1\n")
    data[at + 8 * 8 + 16 : at + 8 * 8 + 24] = (1 << 40).to_bytes(8, "little")  # sample 1, offset of its latents
    data[at + 2 * 8 * 8 : at + 2 * 8 * 8 + 8] = (1 << 40).to_bytes(8, "little")  # sample 2, its key
    record.write_bytes(data)
    found = opened(folder)
    assert found.fetch([0]).keys == ["000000000"]
    for sample in (1, 2):
        with pytest.raises(
            ShardError, match=rf"shard-000000\.tar: the entry of sample {sample} in .*dataset\.index is damaged; .* rcm data index"
        ):
            found.fetch([sample])


def test_whoever_refuses_is_named(folder, tmp_path):
    """A shard that cannot be read is not the index that cannot be written."""
    gone = folder / "gone.tar"
    with pytest.raises(FileNotFoundError) as refused:
        record_shards(folder, [*folder.glob("*.tar"), gone])
    assert refused.value.filename == str(gone) and not list(folder.glob(".*partial"))
    with pytest.raises(OSError, match="cannot write the index") as refused:
        write_record(tmp_path / "nowhere", [])
    assert refused.value.filename == str(tmp_path / "nowhere" / RECORD)


def test_an_older_record_is_taken_over(folder, old, monkeypatch):
    recorded(folder)
    write_shard(folder / shard_name(3), samples(15), first_key=15)
    looked_at = []
    look = set_index.index_shard
    monkeypatch.setattr(set_index, "index_shard", lambda path, **more: looked_at.append(path.name) or look(path, **more))
    assert record_shards(folder, folder.glob("*.tar")) == (4, 20)
    assert looked_at == [shard_name(3)] and len(opened(folder)) == 20 and not list(folder.glob(".*"))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_large_build_records_itself_when_it_is_whole(tmp_path, parts):
    def build(part: int, *, num: int) -> None:
        make = lambda start, stop: samples(start, count=stop - start)  # noqa: E731
        build_shards(tmp_path, num_samples=num, shard_size=1, recipe={}, make=make, part=(part, parts))

    for part in range(parts):
        assert not (tmp_path / RECORD).exists()
        build(part, num=MANY)
    (tmp_path / "dataset.json").unlink()
    assert len(set_index.Record(tmp_path / RECORD).facts) == MANY
    plain = LatentShards(sorted(tmp_path.glob("*.tar")))
    (tmp_path / RECORD).unlink()
    assert same(plain, opened(tmp_path))


def test_the_command(folder, capsys, old):
    """Scans are kept beside the shards, so that a long one can be stopped."""
    for path in folder.glob(f"*{INDEX_SUFFIX}"):
        path.unlink()
    other = folder / "it's"
    other.mkdir()
    write_shard(other / shard_name(0), samples(60), first_key=60)
    assert shards_main(["index", f"{folder}/shard-*.tar", f"{other}/*.tar"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/dataset.index: 3 shards, 15 samples",
        f"{other}/dataset.index: 1 shards, 5 samples",
    ]
    assert len(list(folder.glob(f"*{INDEX_SUFFIX}"))) == 3
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:3000])
    before = (folder / RECORD).read_bytes()
    assert shards_main(["index", f"{folder}/shard-*.tar"]) == 1
    warned, told = capsys.readouterr().err.splitlines()
    assert warned.startswith("warning: index") and told.startswith("error: shard") and "shard-000001.tar" in told
    assert (folder / RECORD).read_bytes() == before and not list(folder.glob(".*"))


def test_memory_and_position_do_not_grow_with_the_samples(tmp_path, old):
    """64 shards of 4,000 samples; all files are holes."""
    spans = np.zeros((4000, 3, 2), np.int64)
    spans[..., 0], spans[..., 1] = 512 * (1 + np.arange(12000).reshape(4000, 3)), 1
    entries = []
    for number in range(64):
        path = tmp_path / shard_name(number)
        with open(path, "wb") as file:
            file.truncate(1 << 23)
        keys = tuple(f"{i:09d}" for i in range(4000 * number, 4000 * (number + 1)))
        entries.append((os.stat(path), ShardIndex(path, 1 << 23, keys, spans, f"{number:032x}")))
    write_record(tmp_path, entries)
    del entries, keys
    tracemalloc.start()
    found = opened(tmp_path)
    assert len(found) == 256_000 and found.fingerprint().startswith("v2-")
    assert tracemalloc.get_traced_memory()[1] < 1_500_000  # the keys alone would take 16 MB
    tracemalloc.stop()
    assert found.shards[63].key(3999) == "000255999" and found.shards[1].span(2, 1) == (512 * 8, 1)
    position = Loader(found, batch_size=1, prefetch=0).state_dict()
    assert len(str(position)) < 200
