"""Shards in the release's layout: written whole or not at all, reproducible, continuable."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from loguru import logger

from rcm.core.errors import ConfigError, first_line
from rcm.core.files import discard, sole_writer, writing
from rcm.core.output_file import require_expanded
from rcm.data.set_index import MANY, record_shards
from rcm.data.tar_index import CONTEXT, FIELDS, ShardError, scan_shard, write_index

MANIFEST = "dataset.json"


@dataclass(frozen=True)
class ShardSample:
    """One sample to store: `latents` [C, T, h, w] or [K, C, T, h, w], `text` [L, E], `prompt`;
    dtypes are stored as given, numbers that are not finite are refused (`ShardError`).

    `context` [C, T, h, w]: the data's latents, for a trajectory whose clean end is not the data; in
    all samples of a shard or in none.
    """

    latents: torch.Tensor
    text: torch.Tensor
    prompt: str
    context: torch.Tensor | None = None

    def members(self) -> dict[str, bytes]:
        """Contents by member name."""
        told = zip(
            (*FIELDS, CONTEXT), (self.latents, self.text, self.prompt, self.context), strict=True
        )
        return {name: self._stored(name, value) for name, value in told if value is not None}

    def _stored(self, name: str, value: torch.Tensor | str) -> bytes:
        if isinstance(value, str):
            return value.encode()
        if not torch.isfinite(value).all():
            raise ShardError(
                f"{name} of a sample ({self.prompt[:60]!r}) holds NaN or infinite values; its"
                " shard was not written"
            )
        return _tensor_bytes(value)


def require_finite(samples: torch.Tensor, numbers: Sequence[int], *, what: str, knob: str) -> None:
    """ConfigError naming the samples of a batch that came out with NaN or infinite values."""
    bad = [
        number
        for number, sample in zip(numbers, samples, strict=True)
        if not torch.isfinite(sample).all()
    ]
    if bad:
        raise ConfigError(f"samples {bad} came out with NaN or infinite {what}; {knob}")


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.tar"


class Members(Protocol):
    """A sample that can be written: contents by member name, in the order they are to lie."""

    def members(self) -> dict[str, bytes]: ...


def write_shard(path: Path, samples: Iterable[Members], *, first_key: int) -> int:
    """Write a shard and its index, renamed when complete; returns the number of samples.

    Keys count from `first_key`, nine digits. Any `OSError` (disk full, no permission) is raised
    again with the path, and nothing half-written stays.
    """
    temporary, count = path.with_name(f".{path.name}.partial"), 0
    try:
        with (
            writing(path, "cannot write shard", own=(temporary, path)),
            sole_writer(temporary) as file,
        ):
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for count, sample in enumerate(samples, 1):
                    for field, data in sample.members().items():
                        info = tarfile.TarInfo(f"{first_key + count - 1:09d}.{field}")
                        info.size, info.mode = len(data), 0o644
                        archive.addfile(info, io.BytesIO(data))
            file.flush()
            os.fsync(file.fileno())
            index = replace(scan_shard(temporary), path=path)
            if path.is_dir():
                discard(path)
            os.replace(temporary, path)
        write_index(index)
    except BlockingIOError as error:
        raise ConfigError(
            f"shard {path} is being written by another process; wait for it, or choose another"
            " --out or --part"
        ) from error
    return count


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A `.pt` file of this tensor alone: a view would drag the storage of its whole batch along."""
    buffer = io.BytesIO()
    torch.save(tensor.detach().cpu().contiguous().clone(), buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class ShardSpan:
    """A shard that is still to be written: samples start .. stop - 1 go to `path`."""

    path: Path
    start: int
    stop: int


def pending_shards(
    folder: Path,
    *,
    num_samples: int,
    shard_size: int,
    recipe: Mapping[str, object],
    part: tuple[int, int] = (0, 1),
) -> tuple[list[Path], list[ShardSpan]]:
    """Claim `folder` for `recipe`; the shards of this `part`, and those missing or damaged.

    `part` (i, n): only shards i, i + n, i + 2n, ..., so that n processes may share a build.
    `recipe` says what the samples are made of: it is stored in `dataset.json` first, and a folder
    built by another recipe is refused with `ConfigError` naming what differs. A damaged shard is
    reported with a warning.
    """
    if num_samples < 1 or shard_size < 1:
        raise ConfigError(
            f"a data set needs at least one sample and one per shard, got num={num_samples},"
            f" shard_size={shard_size}"
        )
    if not 0 <= part[0] < part[1]:
        raise ConfigError(
            f"part {part[0]} of {part[1]} does not exist; parts of a build count from 0"
        )
    _claim(folder, {**recipe, "num_samples": num_samples, "shard_size": shard_size})
    paths, missing = [], []
    for number, start in enumerate(range(0, num_samples, shard_size)):
        if number % part[1] != part[0]:
            continue
        path, stop = folder / shard_name(number), min(start + shard_size, num_samples)
        paths.append(path)
        if not (path.is_file() and _is_whole(path, stop - start)):
            missing.append(ShardSpan(path, start, stop))
    return paths, missing


def write_span(span: ShardSpan, samples: Iterable[Members]) -> None:
    """Write the shard of `span`; `ShardError`, and no file, for another number of samples."""

    def counted() -> Iterator[Members]:
        written = 0
        for sample in samples:
            written += 1
            yield sample
        if written != span.stop - span.start:
            raise ShardError(
                f"shard {span.path} got {written} of {span.stop - span.start} samples from its"
                " source; it was not written"
            )

    write_shard(span.path, counted(), first_key=span.start)


def build_shards(
    folder: Path,
    *,
    num_samples: int,
    shard_size: int,
    recipe: Mapping[str, object],
    make: Callable[[int, int], Iterable[Members]],
    part: tuple[int, int] = (0, 1),
) -> list[Path]:
    """Write samples 0 .. num_samples - 1 as shards, or go on with a stopped build; their paths.

    `make(start, stop)` yields those samples, whatever was written before. Whole shards are kept, a
    damaged one is written again. `recipe` and `part` as in `pending_shards`; the paths of this part
    alone are returned.
    """
    paths, missing = pending_shards(
        folder, num_samples=num_samples, shard_size=shard_size, recipe=recipe, part=part
    )
    for span in missing:
        write_span(span, make(span.start, span.stop))
    record_if_whole(folder, num_samples=num_samples, shard_size=shard_size)
    return paths


def record_if_whole(folder: Path, *, num_samples: int, shard_size: int) -> None:
    """Write a large build's index (`set_index`) once all shards are there, whoever made them."""
    paths = [folder / shard_name(number) for number in range(-(-num_samples // shard_size))]
    if len(paths) >= MANY and all(path.is_file() for path in paths):
        record_shards(folder, paths)


def read_manifest(folder: Path) -> dict[str, object]:
    """What made the data set in `folder`; empty without `dataset.json`, `ConfigError` if broken."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return {}
    try:
        found = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{manifest} is not JSON ({first_line(error)}); it was damaged"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{manifest} holds a {type(found).__name__}, no record of a data set; it was damaged"
        )
    return found


def _short(value: object, room: int = 160) -> str:
    told = repr(value)
    return told if len(told) <= room else f"{told[:room]}..."


def _claim(folder: Path, recipe: Mapping[str, object]) -> None:
    manifest, temporary = folder / MANIFEST, folder / f".{MANIFEST}.partial"
    wanted = json.loads(json.dumps(recipe))
    require_expanded(folder, f"the output folder {folder}")
    with writing(folder, "cannot write to the output folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.is_file():
            # several processes may begin at once: the first decides
            with sole_writer(temporary, wait=True) as file:
                if manifest.is_file():
                    discard(temporary)
                else:
                    file.write(json.dumps(wanted, indent=1, sort_keys=True).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, manifest)
    stored = read_manifest(folder)
    keys = sorted(stored.keys() | wanted.keys())
    pairs = [(k, stored.get(k), wanted.get(k)) for k in keys]
    differing = [
        f"{k}: there {_short(there)}, asked {_short(asked)}"
        for k, there, asked in pairs
        if there != asked
    ]
    if differing:
        told = "; ".join(differing)
        raise ConfigError(
            f"{folder} holds a data set built otherwise ({told}); choose another output folder"
        )


def _is_whole(path: Path, expected: int) -> bool:
    try:
        found = len(scan_shard(path).keys)
    except ShardError as error:
        logger.warning(f"writing a damaged shard again: {error}")
        return False
    if found != expected:
        logger.warning(f"writing shard {path} again: it has {found} of {expected} samples")
    return found == expected
