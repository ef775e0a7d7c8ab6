"""Merged shards hold the bytes of the small ones; what is viewed is what was stored; a stop or
damage leaves no half file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import webdataset as wds
from PIL import Image

from rcm.data.latents import LatentShards
from rcm.data.shard_writer import MANIFEST, ShardSample, shard_name, write_shard
from rcm.data.tar_index import index_shard
from scripts import build_dataset, view_shards
from scripts.shards import main as shards_main
from tests.faults.case import Bomb, Fault, canary, each
from tests.support.shard_files import instead, rewrite, sample, tensor_bytes


def small_set(folder: Path, counts: list[int], *, first: int = 0, **how) -> Path:
    """A folder of shards with so many samples each; keys begin at 0 in every one."""
    folder.mkdir(parents=True)
    for number, count in enumerate(counts):
        write_shard(folder / shard_name(number), [sample(first + sum(counts[:number]) + i, **how) for i in range(count)], first_key=0)
    return folder


def merging(words: list[str]) -> int:
    return shards_main(["merge", *words])


def merge(*words: object) -> int:
    return merging([str(word) for word in words])


@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_byte_arrives_in_order(tmp_path: Path, capsys, size: int) -> None:
    """Read back by webdataset as a peer, members compared with the small shards' as bytes."""
    small_set(tmp_path / "a", [3, 1])
    small_set(tmp_path / "b", [5], first=4)
    assert merge(tmp_path / "a/*.tar", tmp_path / "b/shard-000000.tar", "--out", tmp_path / "out", "--shard_size", size) == 0
    shards = [index_shard(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert [len(shard.keys) for shard in shards] == [min(size, 9 - start) for start in range(0, 9, size)]
    assert [key for shard in shards for key in shard.keys] == [f"{i:09d}" for i in range(9)]
    urls = [str(shard.path) for shard in shards]
    theirs = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    small = [f"{tmp_path}/a/shard-000000.tar", f"{tmp_path}/a/shard-000001.tar", f"{tmp_path}/b/shard-000000.tar"]
    given = list(wds.WebDataset(small, shardshuffle=False, empty_check=False))
    fields = ("latent.pt", "embed.pt", "prompt.txt")
    assert [[s[f] for f in fields] for s in theirs] == [[s[f] for f in fields] for s in given]
    assert f"3 shards in {len(shards)}" in capsys.readouterr().out


def test_what_the_sets_say_of_themselves_is_kept(tmp_path: Path) -> None:
    """Toy sets of two seeds merge into one that trains as before, and knows what it was made
    from.
    """
    for seed in (0, 1):
        words = ["--num", "6", "--shard-size", "4", "--seed", str(seed), "--out", str(tmp_path / f"seed{seed}")]
        assert build_dataset.main(words) == 0
    assert merge(tmp_path / "seed*/*.tar", "--out", tmp_path / "out") == 0
    recipe = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert recipe["source"] == "toy" and recipe["codec"]["name"] == "toy" and recipe["num_samples"] == 12
    assert "seed" not in recipe and [part["own"] for part in recipe["merged"]] == [{"seed": 0}, {"seed": 1}]
    merged, parts = LatentShards(f"{tmp_path}/out/*.tar"), LatentShards(f"{tmp_path}/seed*/*.tar")
    assert merged.fetch(range(12)).latents.equal(parts.fetch(range(12)).latents)


def test_a_stopped_merge_goes_on(tmp_path: Path) -> None:
    small_set(tmp_path / "a", [3, 3])
    words = (tmp_path / "a/*.tar", "--out", tmp_path / "out", "--shard_size", 2)
    assert merge(*words) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / shard_name(1)).unlink()
    (tmp_path / "out" / shard_name(2)).write_bytes(whole[shard_name(2)][:3000])
    assert merge(*words) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == whole


def test_trajectories_keep_their_context(tmp_path: Path) -> None:
    small_set(tmp_path / "a", [2, 2], shape=(3, 4, 3, 2, 2), context=True)
    assert merge(tmp_path / "a/*.tar", "--out", tmp_path / "out") == 0
    merged, parts = LatentShards(f"{tmp_path}/out/*.tar").fetch(range(4)), LatentShards(f"{tmp_path}/a/*.tar").fetch(range(4))
    assert merged.latents.equal(parts.latents) and merged.trajectory.equal(parts.trajectory)


def test_view_lists_what_is_stored(tmp_path: Path, capsys) -> None:
    folder = small_set(tmp_path / "a", [3, 1])
    write_shard(folder / shard_name(2), [ShardSample(sample(9).latents, sample(9).text, "red\x1b[31m\ncross")], first_key=7)
    assert view_shards.main([f"{folder}/*.tar", "--rows", "2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].split(",")[0].strip() for line in told if ".tar" in line] == ["3 samples", "1 sample", "1 sample"]
    assert told[1] == '  000000000  latent.pt [4, 3, 2, 2] bfloat16  embed.pt [5, 6] bfloat16  "prompt 0 ö"'
    assert told[-2].endswith(r'"red\x1b[31m\ncross"') and told[-1] == "5 samples in 3 shards"
    assert view_shards.main([f"{folder}/*.tar", "--rows", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_view_draws(tmp_path: Path, capsys) -> None:
    assert build_dataset.main(["--num", "4", "--out", str(tmp_path / "set")]) == 0
    sheet = tmp_path / "sheet.png"
    assert view_shards.main([str(tmp_path / "set" / shard_name(0)), "--rows", "2", "--sheet", str(sheet)]) == 0
    with Image.open(sheet) as picture:
        assert picture.size[0] > 9 * 64 and picture.size[1] > 2 * 64


def rewritten(folder: Path, change) -> Path:
    """A set of two shards, the second rewritten by `change`."""
    path = small_set(folder / "set", [2, 2]) / shard_name(1)
    rewrite(path, change)
    return path


def cut(folder: Path) -> None:
    path = small_set(folder / "set", [2, 2]) / shard_name(1)
    path.write_bytes(path.read_bytes()[:3000])


def bomb(folder: Path) -> None:
    rewritten(folder, instead("000000001.latent.pt", tensor_bytes(Bomb(canary(folder)))))


def two_kinds(folder: Path) -> None:
    small_set(folder / "set", [1])
    write_shard(folder / "set" / shard_name(1), [sample(3, shape=(3, 4, 3, 2, 2), context=True)], first_key=0)


def two_shapes(folder: Path) -> None:
    small_set(folder / "set", [1])
    write_shard(folder / "set" / shard_name(1), [sample(3, shape=(4, 3, 2, 4))], first_key=0)


def another_set(folder: Path) -> None:
    small_set(folder / "other", [9])
    assert merge(folder / "other/*.tar", "--out", folder / "out") == 0
    small_set(folder / "set", [1, 1])


def two_codecs(folder: Path) -> None:
    for name in ("toy", "natural"):
        assert build_dataset.main(["--num", "2", "--out", str(folder / name)]) == 0
        manifest = folder / name / MANIFEST
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"codec": {"name": name}}))


DAMAGE = [
    ("truncated", cut, r"shard .*000001.tar (is not a whole|.*truncated)"),
    ("no tar", lambda f: (small_set(f / "set", [1]) / shard_name(1)).write_bytes(b"x" * 2000), "000001.tar is not a whole uncompressed"),
    ("code", bomb, r"000001.tar: member 000000001.latent.pt .* which are not executed"),
    (
        "not a number",
        lambda f: rewritten(f, instead("000000001.embed.pt", tensor_bytes(torch.full((5, 6), torch.nan)))),
        "embed.pt holds NaN",
    ),
    (
        "whole numbers",
        lambda f: rewritten(f, instead("000000000.latent.pt", tensor_bytes(torch.ones(4).int()))),
        "torch.int32, expected one of",
    ),
    ("dictionary", lambda f: rewritten(f, instead("000000000.latent.pt", tensor_bytes({"x": torch.ones(1)}))), "expected one tensor"),
    ("no caption", lambda f: rewritten(f, instead("000000001.prompt.txt", None)), "sample 000000001 lacks 000000001.prompt.txt"),
    ("no text", lambda f: rewritten(f, instead("000000001.prompt.txt", b"\xff\xfe")), r"000000001.prompt.txt is not UTF-8"),
    ("empty", lambda f: rewritten(f, lambda name, data: []), "holds no samples"),
]


def clean(folder: Path) -> None:
    """No shard that is not whole, and no leftover."""
    for path in (folder / "out").rglob("*"):
        assert "partial" not in path.name
        if path.suffix == ".tar":
            index_shard(path)


def hurt(main, name: str, refusal: str, prepare, *words: str) -> Fault:
    def argv(folder: Path) -> list[object]:
        prepare(folder)
        return [word.replace("FOLDER", str(folder)) for word in words]

    kind = f"shards to {main.__module__.removeprefix('scripts.').partition('_')[0]}"
    return Fault(name, kind=kind, refusal=refusal, main=main, argv=argv, after=clean)


def linked(folder: Path) -> None:
    (folder / "a.png").symlink_to(small_set(folder / "set", [1, 1]) / shard_name(1))


PAIR = lambda folder: small_set(folder / "set", [1, 1])  # noqa: E731
MERGED, SEEN = ("FOLDER/set/*.tar", "--out", "FOLDER/out", "--shard_size", "1"), ("FOLDER/set/*.tar", "--sheet", "FOLDER/out/a.png")
FAULTS = [
    *(hurt(merging, name, told, prepare, *MERGED) for name, prepare, told in DAMAGE),
    *(hurt(view_shards.main, name, told, prepare, *SEEN) for name, prepare, told in DAMAGE),
    hurt(merging, "two kinds", "two kinds of data", two_kinds, "FOLDER/set/*.tar", "--out", "FOLDER/out"),
    hurt(merging, "two shapes", r"\[4, 3, 2, 4\] bfloat16.*one shape", two_shapes, "FOLDER/set/*.tar", "--out", "FOLDER/out"),
    hurt(merging, "two codecs", "built for different codec", two_codecs, "FOLDER/{toy,natural}/*.tar", "--out", "FOLDER/out"),
    hurt(merging, "into itself", "lies in the output folder.*another --out", PAIR, "FOLDER/set/*.tar", "--out", "FOLDER/set"),
    hurt(merging, "nothing there", "no shard matches .*change the pattern", PAIR, "FOLDER/none/*.tar", "--out", "FOLDER/out"),
    hurt(
        merging,
        "home that no shell expands",
        "would be in a folder called ~; write /",
        PAIR,
        "FOLDER/set/*.tar",
        "--out",
        "~/out",
    ),
    hurt(
        merging,
        "another set is there",
        r"built otherwise \(merged: there \[\{.*shard-000000.*\}\], asked \[\{.*shard-000001.*\}\]; num_samples: there 9, asked 2\)",
        another_set,
        "FOLDER/set/*.tar",
        "--out",
        "FOLDER/out",
    ),
    hurt(view_shards.main, "codec of no picture", "--codec is for the picture.*add --sheet", PAIR, "FOLDER/set/*.tar", "--codec", "toy"),
    hurt(view_shards.main, "VAE of no picture", "--vae_path is for the picture.*add --sheet", PAIR, "FOLDER/set/*.tar", "--vae_path", "x"),
    hurt(view_shards.main, "picture of none", "--rows 0 must be at least 1", PAIR, *SEEN, "--rows", "0"),
    hurt(view_shards.main, "a shard", "a.png is a file that --shards reads", linked, "FOLDER/set/*.tar", "--sheet", "FOLDER/a.png"),
    hurt(view_shards.main, "no picture", "--sheet .*must end in .png", PAIR, "FOLDER/set/*.tar", "--sheet", "FOLDER/a.jpg"),
]


def test_sets_of_two_shapes_leave_nothing_behind(tmp_path: Path) -> None:
    """Not even the record of a set, in the way of the next merge into that folder."""
    two_shapes(tmp_path)
    assert merge(tmp_path / "set/*.tar", "--out", tmp_path / "out") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@each(FAULTS)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)
