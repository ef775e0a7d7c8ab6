"""What lies in a shard, read without executing anything: single members and whole samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rcm.core.errors import CheckpointError
from rcm.data.tar_index import FIELDS, Shard, ShardError
from rcm.storage.pickle_file import read_tensor

_PROMPT = FIELDS.index("prompt.txt")


@dataclass(frozen=True)
class StoredSample:
    """`contents`: bytes by member; `shapes`: the likes of "[24, 9, 4, 4] bfloat16" by member that
    is a tensor; `prompt`: the caption.
    """

    key: str
    contents: Mapping[str, bytes]
    shapes: Mapping[str, str]
    prompt: str

    @classmethod
    def read(cls, shard: Shard, sample: int) -> StoredSample:
        """Sample number `sample` of a shard; `ShardError` as `stored_tensor` and `stored_prompt`
        raise it, or for a member moved or cut.
        """
        members = shard.read_members(sample, range(len(shard.fields)))
        contents = {f: bytes(data) for f, data in zip(shard.fields, members, strict=True)}
        tensors = {
            f: stored_tensor(shard, sample, i, contents[f])
            for i, f in enumerate(shard.fields)
            if i != _PROMPT
        }
        shapes = {
            field: f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for field, tensor in tensors.items()
        }
        prompt = stored_prompt(shard, sample, contents[FIELDS[_PROMPT]])
        return cls(shard.key(sample), contents, shapes, prompt)

    def members(self) -> dict[str, bytes]:
        return dict(self.contents)


def stored_tensor(
    shard: Shard, sample: int, field: int, data: bytes | bytearray | None = None
) -> torch.Tensor:
    """Member `field` of a sample (`data`: its bytes, where they were read already), in the dtype it
    has. `ShardError`, naming shard and member, for anything but one dense tensor of at least one
    floating-point number, all of which float32 holds as finite ones.
    """
    name = f"shard {shard.path}: member {shard.member(sample, field)}"
    try:
        value = read_tensor(shard.read(sample, field) if data is None else data, name=name)
    except CheckpointError as error:
        raise ShardError(str(error)) from error
    if not value.is_floating_point():
        raise ShardError(
            f"{name} holds a tensor of {value.dtype}, expected one of floating-point numbers"
        )
    if not value.numel():
        raise ShardError(f"{name} has shape {list(value.shape)}, which holds nothing")
    if not _all_finite(value):
        raise ShardError(f"{name} holds NaN or infinite values")
    return value


def _all_finite(value: torch.Tensor) -> bool:
    """Whether float32 holds every number as a finite one. By the extremes, which a NaN passes
    through to: one quick pass, where torch.isfinite takes more time than reading the sample.
    """
    quick = value.dtype in (torch.float32, torch.bfloat16, torch.float16)
    numbers = value if quick else value.float()
    return bool(torch.stack(torch.aminmax(numbers)).isfinite().all())


def stored_prompt(shard: Shard, sample: int, data: bytes | bytearray | None = None) -> str:
    """The caption of a sample (`data`: its bytes); `ShardError` unless it is UTF-8 without NUL, of
    which a hole in a file consists.
    """
    try:
        text = (shard.read(sample, _PROMPT) if data is None else data).decode("utf-8")
        if "\0" in text:
            raise ShardError(
                f"shard {shard.path}: {shard.member(sample, _PROMPT)} holds NUL bytes, which no"
                " text has; the file was damaged"
            )
        return text
    except UnicodeDecodeError as error:
        raise ShardError(
            f"shard {shard.path}: {shard.member(sample, _PROMPT)} is not UTF-8: {error}"
        ) from error
