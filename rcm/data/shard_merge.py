"""Shards of one kind joined into larger or smaller ones: members are checked and copied whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rcm.core.errors import ConfigError
from rcm.data.set_index import open_shards
from rcm.data.shard_writer import MANIFEST, build_shards, read_manifest
from rcm.data.stored_sample import StoredSample
from rcm.data.tar_index import Shard

MEANINGS = ("codec", "text", "dtype", "latent_shape", "training_type", "kd_timesteps", "pattern")
"""Keys of a `dataset.json` that say what the numbers of a shard mean; sets that differ in one are
two kinds of data.
"""

_OF_A_BUILD = ("num_samples", "shard_size")


def merge_shards(paths: Sequence[Path], folder: Path, *, shard_size: int) -> list[Path]:
    """Write all samples of `paths`, in order, as shards of `shard_size` into `folder`; their paths.

    Keys count anew from 0. Like every build it goes on after a stop, and a damaged shard of its own
    is written again. `dataset.json` keeps what the sets have in common, and each set's own words
    under "merged". Raises `ShardError` for a damaged or incomplete sample, naming shard and member;
    `ConfigError` for shards of different kinds or shapes, or that lie in `folder` itself. Nothing
    half-written stays.
    """
    inside = [path for path in paths if path.resolve().parent == folder.resolve()]
    if inside:
        raise ConfigError(
            f"{inside[0]} lies in the output folder {folder}, whose shards have the same names;"
            " choose another --out"
        )
    shards = open_shards(paths)
    for other in shards[1:]:
        if other.fields != shards[0].fields:
            told = (
                f"{shard.path} has the members {', '.join(shard.fields)}"
                for shard in (shards[0], other)
            )
            raise ConfigError(f"{' and '.join(told)}: two kinds of data; merge each alone")
    first, recipe = StoredSample.read(shards[0], 0), _joint_recipe(shards)

    def like_the_first(shard: Shard, place: int) -> StoredSample:
        sample = StoredSample.read(shard, place)
        if sample.shapes != first.shapes:
            raise ConfigError(
                f"sample {sample.key} of {shard.path} has {_told(sample)}, the first of"
                f" {shards[0].path} {_told(first)}; a set has one shape: merge each alone"
            )
        return sample

    for shard in shards[1:]:  # sets of other shapes, before anything is written
        like_the_first(shard, 0)

    def make(start: int, stop: int) -> Iterator[StoredSample]:
        return (like_the_first(shard, place) for shard, place in _places(shards, start, stop))

    return build_shards(
        folder,
        num_samples=sum(len(s) for s in shards),
        shard_size=shard_size,
        recipe=recipe,
        make=make,
    )


def _places(shards: Sequence[Shard], start: int, stop: int) -> Iterator[tuple[Shard, int]]:
    """Shard and place in it of samples `start` .. `stop - 1` of all."""
    for shard in shards:
        count = len(shard)
        yield from ((shard, place) for place in range(max(start, 0), min(stop, count)))
        start, stop = start - count, stop - count


def _told(sample: StoredSample) -> str:
    return ", ".join(f"{field} {shape}" for field, shape in sample.shapes.items())


def _joint_recipe(shards: Sequence[Shard]) -> dict[str, object]:
    """What all sets say of themselves, and under "merged" per set: what it alone says, its shards
    with the hashes of their contents.
    """
    folders = list(dict.fromkeys(shard.path.parent for shard in shards))
    told = {
        folder: {k: v for k, v in read_manifest(folder).items() if k not in _OF_A_BUILD}
        for folder in folders
    }
    head = told[folders[0]]
    for folder in folders[1:]:
        for key in MEANINGS:
            if key in head and key in told[folder] and head[key] != told[folder][key]:
                raise ConfigError(
                    f"{folders[0]} and {folder} were built for different {key} ({MANIFEST}:"
                    f" {head[key]!r} and {told[folder][key]!r}): two kinds of data; merge each"
                    " alone"
                )
    others = told.values()
    common = {k: v for k, v in head.items() if all(k in o and o[k] == v for o in others)}
    sets = [
        {
            "own": {k: v for k, v in told[folder].items() if k not in common},
            "shards": [
                [shard.path.name, shard.digest] for shard in shards if shard.path.parent == folder
            ],
        }
        for folder in folders
    ]
    return {**common, "merged": sets}
