"""Reading: against webdataset as a peer, and every kind of damage with its message."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset as wds

from rcm.core.errors import ConfigError
from rcm.data.latents import LatentShards, expand_pattern
from rcm.data.shard_writer import ShardSample, shard_name, write_shard
from rcm.data.tar_index import INDEX_SUFFIX, ShardError, index_shard, scan_shard
from tests.support.shard_files import instead, rewrite, sample, tensor_bytes


@pytest.fixture
def folder(tmp_path) -> Path:
    for shard in range(3):
        write_shard(tmp_path / shard_name(shard), [sample(5 * shard + i) for i in range(5)], first_key=5 * shard)
    return tmp_path


def shards(folder: Path, **options) -> LatentShards:
    return LatentShards(str(folder / "shard-*.tar"), **options)


def forget_index(path: Path) -> None:
    path.with_name(path.name + INDEX_SUFFIX).unlink()


def test_samples_come_back_whole(folder):
    source = shards(folder, latent_channels=4, text_shape=(5, 6))
    assert len(source) == 15
    batch = source.fetch([13, 0, 5])
    for row, number in enumerate((13, 0, 5)):
        told = sample(number)
        assert torch.equal(batch.latents[row], told.latents.float()) and torch.equal(batch.cond[row], told.text.float())
        assert batch.prompts[row] == told.prompt and batch.keys[row] == f"{number:09d}"
    assert batch.latents.dtype == batch.cond.dtype == torch.float32
    assert batch.trajectory is None


@pytest.mark.parametrize("indexed", [True, False])
def test_webdataset_reads_the_same(folder, indexed):
    """The layout is webdataset's: its own reader yields the same samples in the same order."""
    if not indexed:
        for path in folder.glob("shard-*.tar"):
            forget_index(path)
    source = shards(folder)
    load = lambda data: torch.load(io.BytesIO(data), weights_only=True).float()  # noqa: E731
    peer = list(wds.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False))
    assert len(peer) == len(source) == 15
    mine = source.fetch(range(15))
    for row, other in enumerate(peer):
        assert mine.keys[row] == other["__key__"]
        assert mine.prompts[row] == other["prompt.txt"].decode()
        assert torch.equal(mine.latents[row], load(other["latent.pt"]))
        assert torch.equal(mine.cond[row], load(other["embed.pt"]))


def test_shards_written_by_webdataset_are_read(tmp_path):
    with wds.TarWriter(str(tmp_path / "shard-0.tar")) as writer:
        for number in range(3):
            told = sample(number)
            record = {"latent.pt": tensor_bytes(told.latents), "embed.pt": tensor_bytes(told.text), "prompt.txt": told.prompt.encode()}
            writer.write({"__key__": f"sub/{number:09d}", **record})
    batch = shards(tmp_path).fetch([2])
    assert batch.keys == ["sub/000000002"] and torch.equal(batch.latents[0], sample(2).latents.float())


def test_patterns(folder):
    names = lambda pattern: [path.name for path in expand_pattern(str(folder / pattern))]  # noqa: E731
    assert names("shard-{000000..000001}.tar") == ["shard-000000.tar", "shard-000001.tar"]
    assert names("shard-{000002,000000}.tar") == ["shard-000002.tar", "shard-000000.tar"]
    assert names("shard-00000[12].tar") == ["shard-000001.tar", "shard-000002.tar"]
    assert names("{shard-*,shard-000001}.tar") == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    for missing in ("nothing-*.tar", "shard-{000000..000003}.tar"):
        with pytest.raises(ConfigError, match=r"dataloader_train\.tar_path_pattern"):
            expand_pattern(str(folder / missing))


def test_first_frames_and_trajectories(tmp_path):
    states = [sample(i, shape=(5, 4, 3, 2, 2)) for i in range(2)]
    write_shard(tmp_path / shard_name(0), states, first_key=0)
    batch = shards(tmp_path, num_latent_frames=2).fetch([1, 0])
    told = torch.stack([states[1].latents, states[0].latents]).float()
    assert batch.trajectory.shape == (2, 5, 4, 2, 2, 2)
    assert torch.equal(batch.trajectory, told[:, :, :, :2])
    assert torch.equal(batch.latents, told[:, 0, :, :2])


def trajectory(number: int, *, context=(4, 3, 2, 2)) -> ShardSample:
    told = sample(number, shape=(5, 4, 3, 2, 2))
    return ShardSample(told.latents, told.text, told.prompt, sample(100 + number, shape=context).latents)


@pytest.mark.parametrize("indexed", [True, False])
def test_the_data_a_trajectory_ran_under_is_its_latents(tmp_path, indexed):
    """`context.pt` arrives as `latents`, cut to the same frames; the trajectory's clean end stays
    its own.
    """
    told = [trajectory(i) for i in range(2)]
    write_shard(tmp_path / shard_name(0), told, first_key=0)
    if not indexed:
        forget_index(tmp_path / shard_name(0))
    else:
        beside = tmp_path / (shard_name(0) + INDEX_SUFFIX)
        assert json.loads(beside.read_text())["fields"][3:] == ["context.pt"]
    batch = shards(tmp_path, num_latent_frames=2, cache_bytes=1 << 20).fetch([1, 0, 1])
    assert torch.equal(batch.latents, torch.stack([told[i].context[:, :2] for i in (1, 0, 1)]).float())
    assert torch.equal(batch.trajectory, torch.stack([told[i].latents[:, :, :2] for i in (1, 0, 1)]).float())


def test_contexts_are_in_all_samples_and_fit_them(tmp_path):
    path = tmp_path / shard_name(0)
    write_shard(path, [trajectory(0, context=(4, 2, 2, 2))], first_key=0)
    with pytest.raises(ConfigError, match=r"000000000\.context\.pt has shape \(4, 2, 2, 2\), beside latent\.pt \(5, 4, 3, 2, 2\)"):
        shards(tmp_path).fetch([0])
    with pytest.raises(ShardError, match=r"sample 000000001 lacks 000000001\.context\.pt"):
        write_shard(path, [trajectory(0), sample(1, shape=(5, 4, 3, 2, 2))], first_key=0)
    write_shard(path, [trajectory(0)], first_key=0)
    write_shard(tmp_path / shard_name(1), [sample(1, shape=(5, 4, 3, 2, 2))], first_key=1)
    with pytest.raises(ConfigError, match=r"shard-000000\.tar has context\.pt members and .*shard-000001\.tar has none"):
        shards(tmp_path)


def test_shapes_that_contradict_the_settings(folder):
    with pytest.raises(ConfigError, match=r"000000002\.latent\.pt has 4 channels, the network takes 16"):
        shards(folder, latent_channels=16).fetch([2])
    with pytest.raises(ConfigError, match=r"has 3 latent frames, fewer than state_t=4"):
        shards(folder, num_latent_frames=4).fetch([0])
    for frames in (0, -1):  # which cut frames from the end
        with pytest.raises(ConfigError, match=f"num_latent_frames={frames} must be at least 1"):
            shards(folder, num_latent_frames=frames)
    for text_shape in ((4, 6), (8, 7)):
        with pytest.raises(ConfigError, match=r"000000001\.embed\.pt has shape \[5, 6\], expected \[at most \d, \d\]"):
            shards(folder, text_shape=text_shape).fetch([1])
    shards(folder, text_shape=(8, 6)).fetch([1])
    with pytest.raises(ConfigError, match=r"000000001\.latent\.pt has latent frames of 2 x 2, the run is set to 4 x 4.*latent_hw"):
        shards(folder, latent_size=(4, 4)).fetch([1])
    write_shard(folder / shard_name(3), [sample(15, shape=(4, 3, 2, 4)), sample(16, shape=(4, 3))], first_key=15)
    with pytest.raises(ConfigError, match="differ in shape.*shard-000003"):
        shards(folder).fetch([0, 15])
    with pytest.raises(ConfigError, match=r"000000016\.latent\.pt has shape \(4, 3\)"):
        shards(folder).fetch([16])
    with pytest.raises(IndexError, match="99"):
        shards(folder).fetch([99])


@pytest.mark.parametrize("cut", ["middle", "boundary", "marker"])
def test_a_truncated_shard_is_named(folder, cut):
    """Cut inside a member, exactly between two members (which tarfile takes for a good end), and
    inside the end marker.
    """
    path = folder / shard_name(1)
    member = int(index_shard(path).spans[3, 0, 0])
    whole = path.read_bytes()
    end = tarfile_end(path)
    size = {"middle": member + 700, "boundary": member - 512, "marker": end + 512}[cut]
    path.write_bytes(whole[:size])
    with pytest.raises(ShardError, match=r"shard-000001\.tar.*00000000\d\.(latent|prompt)"):
        shards(folder)


def tarfile_end(path: Path) -> int:
    with tarfile.open(path) as archive:
        archive.getmembers()
        return archive.offset


def test_a_damaged_header_is_not_the_end(folder):
    path = folder / shard_name(0)
    data = bytearray(path.read_bytes())
    # checksum field of 000000002.embed.pt
    data[int(scan_shard(path).spans[2, 1, 0]) - 512 + 150] ^= 0xFF
    path.write_bytes(data)
    forget_index(path)
    with pytest.raises(ShardError, match=r"shard-000000\.tar.*000000002\.latent\.pt.*header is damaged"):
        shards(folder)


def test_a_hole_over_a_header_is_not_the_end(folder):
    """Blocks of zeros end a tar file: what follows them would be lost without a word."""
    path = folder / shard_name(0)
    whole, at = path.read_bytes(), int(scan_shard(path).spans[2, 0, 0]) - 512
    forget_index(path)
    for damaged in (whole[:at] + bytes(1024) + whole[at + 1024 :], whole + (folder / shard_name(1)).read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"goes on after its end \(byte \d+ of \d+, after member .*prompt\.txt\): there is a hole"):
            shards(folder)
    path.write_bytes(whole + bytes(1 << 21))  # as a copy in blocks ends
    assert len(shards(folder)) == 15


def test_a_header_that_leads_backwards_ends_the_scan(tmp_path):
    """A negative size would bring the same header again and again."""
    with tarfile.open(tmp_path / "shard-0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("0.latent.pt")
        info.pax_headers = {"size": "-1536"}
        archive.addfile(info)
    with pytest.raises(ShardError, match=r"shard-0\.tar.*(leads backwards|not a whole)"):
        shards(tmp_path)


def test_a_caption_of_zeros_is_damage(folder):
    rewrite(folder / shard_name(0), instead("000000004.prompt.txt", bytes(4)))
    with pytest.raises(ShardError, match=r"000000004\.prompt\.txt holds NUL bytes"):
        shards(folder).fetch([4])


def test_damage_after_indexing_is_named(folder):
    source = shards(folder)
    path = folder / shard_name(2)
    path.write_bytes(path.read_bytes()[: int(source.shards[2].spans[4, 0, 0]) + 40])
    with pytest.raises(ShardError, match=r"shard-000002\.tar: member 000000014\.latent\.pt has 40 of"):
        source.fetch([14])


def test_a_missing_member_is_named(folder):
    rewrite(folder / shard_name(0), instead("000000003.embed.pt", None))
    with pytest.raises(ShardError, match=r"sample 000000003 lacks 000000003\.embed\.pt"):
        shards(folder)


def test_a_doubled_member_is_named(folder):
    rewrite(folder / shard_name(0), lambda name, data: [("000000000.prompt.txt" if name == "000000001.prompt.txt" else name, data)])
    with pytest.raises(ShardError, match=r"000000000\.prompt\.txt appears twice"):
        shards(folder)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"not a tensor", "cannot be read"),
        (tensor_bytes({"x": torch.zeros(1)}), "holds a dict"),
        (tensor_bytes(torch.zeros(4, 3, 2, 2, dtype=torch.int64)), "holds a tensor of torch.int64"),
        (tensor_bytes(torch.full((4, 3, 2, 2), float("nan"))), "NaN"),
        (tensor_bytes(torch.zeros(4, 0, 2, 2)), r"has shape \[4, 0, 2, 2\], which holds nothing"),
    ],
)
def test_a_damaged_member_is_named(folder, content, word):
    rewrite(folder / shard_name(0), instead("000000004.latent.pt", content))
    with pytest.raises(ShardError, match=rf"shard-000000\.tar: member 000000004\.latent\.pt.*{word}"):
        shards(folder).fetch([4])


def test_other_files_are_refused(tmp_path):
    (tmp_path / "shard-0.tar").write_bytes(b"x" * 3000)
    with pytest.raises(ShardError, match="not a whole uncompressed tar"):
        shards(tmp_path)
    with tarfile.open(tmp_path / "shard-0.tar", "w:gz"):
        pass
    with pytest.raises(ShardError, match=r"shard-0\.tar"):
        shards(tmp_path)
    with tarfile.open(tmp_path / "shard-0.tar", "w"):
        pass
    with pytest.raises(ShardError, match="holds no samples"):
        shards(tmp_path)


def test_an_index_is_believed_for_its_own_shard_only(folder, caplog):
    """It spares the scan; a shard of the same size and date but other bytes is scanned, and members
    are looked at where they are read.
    """
    path, other = folder / shard_name(0), folder / shard_name(1)
    beside = path.with_name(path.name + INDEX_SUFFIX)
    scanned, stored = scan_shard(path), json.loads(beside.read_text())
    assert index_shard(path).keys == scanned.keys and (index_shard(path).spans == scanned.spans).all()
    stored["keys"][0] = "renamed"
    beside.write_text(json.dumps(stored))
    assert index_shard(path).keys[0] == "renamed"
    with pytest.raises(ShardError, match=r"renamed\.latent\.pt is not where it was found"):
        shards(folder).fetch([0])
    for change in ({"spans": stored["spans"][:-1]}, {"spans": [10**12] * len(stored["spans"])}, {"keys": [None] * 5}, {"digest": 3}):
        beside.write_text(json.dumps({**stored, **change}))
        assert index_shard(path).keys == scanned.keys
    for text in ("{", "[]", "null", '"x"'):
        beside.write_text(text)
        assert index_shard(path).keys == scanned.keys
    write_shard(path, [sample(i) for i in range(5)], first_key=0)
    assert other.stat().st_size == path.stat().st_size
    before = path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert index_shard(path).keys == scan_shard(other).keys


def test_patterns_mean_what_exists_and_else_what_bash_would(tmp_path):
    for name in ("run[1]/a.tar", "x{y}/a.tar", "x{y}/b.tar", "{0..3}/a.tar", "s-1.tar", "s-2.tar", "._s-1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in expand_pattern(f"{tmp_path}/{pattern}")]

    assert found("run[1]/*.tar") == found("run[1]/a.tar") == ["run[1]/a.tar"]
    assert found("x{y}/{b,a}.tar") == ["x{y}/b.tar", "x{y}/a.tar"]
    assert found("{0..3}/*.tar") == ["{0..3}/a.tar"]
    assert found("s-{2..1}.tar") == ["s-2.tar", "s-1.tar"]
    assert found("[s]-*.tar") == ["s-1.tar", "s-2.tar"]
    refused = {"s-{1..10000000000}.tar": "more than", "s-{1..3}.tar": "no shard matches", "x{y}": "is no file", "z{y}": "no shard"}
    for pattern, words in refused.items():
        with pytest.raises(ConfigError, match=words):
            found(pattern)


def test_what_macos_adds_is_no_sample(folder):
    added = ("._{}", "{}", "__MACOSX/._{}", ".DS_Store")
    rewrite(folder / shard_name(0), lambda name, data: [(form.format(name), data) for form in added])
    assert shards(folder).fetch([0, 14]).keys == ["000000000", "000000014"]


def test_memory_cache_gives_the_same_and_respects_its_room(folder):
    plain, cached = shards(folder), shards(folder, cache_bytes=2 * 4 * (48 + 30))
    for _ in range(2):
        assert torch.equal(plain.fetch([0, 1, 2]).latents, cached.fetch([0, 1, 2]).latents)
    for path in folder.glob("*.tar"):
        path.unlink()
    assert cached.fetch([0, 1]).keys == ["000000000", "000000001"]
    with pytest.raises(OSError):
        cached.fetch([2])


def test_fingerprint_follows_the_data(folder):
    before = shards(folder).fingerprint()
    assert before == shards(folder).fingerprint()
    forget_index(folder / shard_name(1))
    assert before == shards(folder).fingerprint()
    rewrite(folder / shard_name(2), instead("000000013.prompt.txt", lambda data: data[:-1] + b"x"))
    assert shards(folder).fingerprint() != before
