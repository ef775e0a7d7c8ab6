"""Shards to spoil: small samples, a toy set, and members put back otherwise."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from rcm.data.shard_writer import ShardSample
from scripts import build_dataset

Members = Iterable[tuple[str, bytes]]


def sample(number: int, *, shape=(4, 3, 2, 2), text=(5, 6), dtype=torch.bfloat16, context: bool = False) -> ShardSample:
    """Random tensors of its own for every number."""
    generator = torch.Generator().manual_seed(number)
    draw = lambda size: torch.randn(size, generator=generator).to(dtype)  # noqa: E731
    return ShardSample(draw(shape), draw(text), f"prompt {number} ö", draw(shape[1:]) if context else None)


def six_toy_videos(folder: Path) -> Path:
    """In two shards."""
    sizes = ["--size", "8x8", "--frames", "11", "--text-len", "8", "--text-dim", "8"]
    assert build_dataset.main(["--source", "toy", "--num", "6", "--shard-size", "3", *sizes, "--out", str(folder)]) == 0
    return folder


def tensor_bytes(value: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_members(shard: Path, members: Members) -> None:
    """A tar file of (name, content)."""
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def rewrite(shard: Path, change: Callable[[str, bytes], Members]) -> None:
    """Put what `change` makes of every member (name, bytes) in its place."""
    with tarfile.open(shard) as archive:
        members = [(info.name, archive.extractfile(info).read()) for info in archive]
    write_members(shard, (put for name, data in members for put in change(name, data)))


def instead(member: str, change: bytes | Callable[[bytes], bytes] | None) -> Callable[[str, bytes], Members]:
    """For `rewrite`: another content of one member, or (None) no such member."""

    def put(name: str, data: bytes) -> Members:
        if name != member:
            return [(name, data)]
        return [] if change is None else [(name, change(data) if callable(change) else change)]

    return put
