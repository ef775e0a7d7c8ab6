from __future__ import annotations

import errno
import json
import os
import tarfile

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.data.latents import LatentShards
from rcm.data.shard_writer import MANIFEST, ShardSample, ShardSpan, build_shards, read_manifest, shard_name, write_shard, write_span
from rcm.data.tar_index import ShardError


def make(start: int, stop: int):
    batch = torch.arange(64.0).view(1, 4, 1, 4, 4).repeat(stop - start, 1, 1, 1, 1)
    for row, number in zip(batch, range(start, stop), strict=True):
        yield ShardSample(row + number, torch.full((2, 3), float(number)), f"p{number}")


def build(folder, *, num=10, size=4, source=make, **recipe):
    return build_shards(folder, num_samples=num, shard_size=size, recipe={"made": "here", **recipe}, make=source)


def test_a_build_holds_every_sample_once(tmp_path):
    paths = build(tmp_path / "new" / "set")
    assert [path.name for path in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    batch = LatentShards(str(paths[0].parent / "*.tar")).fetch(range(10))
    assert batch.cond[:, 0, 0].tolist() == list(range(10))
    assert batch.keys == [f"{i:09d}" for i in range(10)]
    assert json.loads((paths[0].parent / MANIFEST).read_text())["made"] == "here"
    assert {p.suffix for p in paths[0].parent.iterdir()} == {".tar", ".json"}


def test_the_same_build_gives_the_same_bytes(tmp_path):
    first, second = build(tmp_path / "a"), build(tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_a_member_holds_its_own_tensor_only(tmp_path):
    """A row of a big batch shares the batch's storage; saving it as it is would write the whole
    batch each time.
    """

    def rows(start, stop):
        batch, text = torch.randn(stop - start, 4, 1, 4, 4), torch.randn(stop - start, 2, 3)
        return (ShardSample(a, b, "") for a, b in zip(batch, text, strict=True))

    (path,) = build(tmp_path, num=200, size=200, source=rows)
    with tarfile.open(path) as archive:
        assert max(info.size for info in archive) < 2500


def test_a_stopped_build_goes_on(tmp_path):
    def stops(start, stop):
        yield from make(start, min(stop, 6))
        if stop > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, source=stops)
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == [shard_name(0)]
    assert not list(tmp_path.glob(".*partial"))
    asked = []

    def counts(start, stop):
        asked.append((start, stop))
        yield from make(start, stop)

    build(tmp_path, source=counts)
    assert asked == [(4, 8), (8, 10)]
    build(tmp_path, source=counts)
    assert asked == [(4, 8), (8, 10)]
    path = tmp_path / shard_name(1)
    path.write_bytes(path.read_bytes()[:3000])
    build(tmp_path, source=counts)
    assert asked[2:] == [(4, 8)]
    assert len(LatentShards(str(tmp_path / "*.tar"))) == 10


def test_another_recipe_is_refused(tmp_path):
    build(tmp_path)
    with pytest.raises(ConfigError, match="made: there 'here', asked 'there'"):
        build(tmp_path, made="there")
    with pytest.raises(ConfigError, match="shard_size: there 4, asked 5"):
        build(tmp_path, size=5)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        build(tmp_path)


def test_a_source_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(ShardError, match="got 3 of 4 samples"):
        build(tmp_path, source=lambda start, stop: list(make(start, stop))[:3])
    assert not list(tmp_path.glob("shard-*"))
    with pytest.raises(ConfigError, match="shard_size=0"):
        build(tmp_path, size=0)


def test_too_few_samples_leave_the_old_shard(tmp_path):
    """Also none at all, of which there is no shard."""
    path = tmp_path / shard_name(0)
    write_shard(path, make(0, 2), first_key=0)
    before = path.read_bytes()
    with pytest.raises(ShardError, match=r"shard-000000\.tar got 1 of 2 samples from its source; it was not written"):
        write_span(ShardSpan(path, 0, 2), make(0, 1))
    with pytest.raises(ShardError, match="holds no samples"):
        write_shard(path, [], first_key=0)
    assert path.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_what_the_samples_are_read_from_is_named_alone(tmp_path):
    def lost(start, stop):
        yield from make(start, 1)
        (tmp_path / "source.tar").read_bytes()

    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: '.*source\.tar'$"):
        build(tmp_path / "out", source=lost)


def test_of_two_builds_at_once_the_first_decides(tmp_path, monkeypatch):
    """The second looked before the record of the first was there."""
    build(tmp_path)
    there, looks = type(tmp_path).is_file, []

    def late(path):
        looks.append(path)
        return there(path) and (path.name != MANIFEST or len(looks) > 1)

    monkeypatch.setattr(type(tmp_path), "is_file", late)
    with pytest.raises(ConfigError, match="built otherwise \\(seed: there None, asked 1"):
        build(tmp_path, seed=1)
    assert read_manifest(tmp_path)["made"] == "here" and not list(tmp_path.glob(".*"))


def test_a_full_disk_names_the_path_and_keeps_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / shard_name(0)
    write_shard(path, make(0, 2), first_key=0)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*shard-000000\.tar") as caught:
        write_shard(path, make(0, 3), first_key=0)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_an_unwritable_output_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder.*file/set"):
        build(tmp_path / "file" / "set")


def test_parts_of_a_build_make_the_whole(tmp_path):
    whole = build(tmp_path / "whole")
    asked = [
        build_shards(tmp_path / "parts", num_samples=10, shard_size=4, recipe={"made": "here"}, make=make, part=(i, 2)) for i in (1, 0)
    ]
    assert [[path.name for path in paths] for paths in asked] == [[shard_name(1)], [shard_name(0), shard_name(2)]]
    assert [p.read_bytes() for p in sorted((tmp_path / "parts").glob("*.tar"))] == [p.read_bytes() for p in whole]
    with pytest.raises(ConfigError, match="part 2 of 2"):
        build_shards(tmp_path / "parts", num_samples=10, shard_size=4, recipe={"made": "here"}, make=make, part=(2, 2))


def test_a_folder_tells_what_it_was_made_from(tmp_path):
    assert read_manifest(tmp_path) == {}
    build(tmp_path)
    assert read_manifest(tmp_path)["made"] == "here"
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_manifest(tmp_path)
