"""Dicts of tensors from anywhere: joined keys, known shapes, one wording for what misfits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rcm.core.errors import CheckpointError

MOST_LEVELS = 32
MOST_ENTRIES = 1_000_000


class LazyWeights(Mapping[str, Tensor]):
    """Names -> CPU tensors, read when asked for; shapes and dtypes are known beforehand."""

    headers: Mapping[str, Tensor]
    """Name -> meta tensor with the shape and dtype of the entry."""
    sources: tuple[Path, ...] = ()
    """Files and folders that are read."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __contains__(self, key: object) -> bool:
        return key in self.headers

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} tensors"


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` (or a header) in `dtype` (None: its own); `CheckpointError` naming it for values
    that are finite and beyond what float16 holds.
    """
    found = tensor.to(dtype or tensor.dtype)
    if (
        found.dtype is torch.float16
        and not found.is_meta
        and not bool(found.isfinite().all())
        and bool(tensor.isfinite().all())
    ):
        raise CheckpointError(
            f"{name} has values up to {tensor.abs().max():.3g}, beyond float16's 65504; convert"
            " with --dtype bf16 or fp32"
        )
    return found


def headers_of(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors with the shapes and dtypes of `weights`, without reading any."""
    return weights.headers if isinstance(weights, LazyWeights) else weights


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, without reading any."""
    return {name: tuple(tensor.shape) for name, tensor in headers_of(weights).items()}


def renamed(key: str, table: Iterable[tuple[str, str]]) -> str | None:
    """`key`, its first dotted beginning found in `table` replaced; None if none is."""
    for old, new in table:
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return None


def flatten(state: Mapping[str, object]) -> dict[str, object]:
    """Nested state dicts as one, their keys joined with dots; what is no mapping with string keys
    stays as it is.

    Raises `CheckpointError` for two entries of one joined name, and for more levels or entries than
    a state dict has (a dict that holds itself, or one dict many times over).
    """
    out: dict[str, object] = {}

    def add(inner: Mapping[str, object], lead: str, depth: int) -> None:
        for key, value in inner.items():
            name = f"{lead}{key}"
            if (
                isinstance(value, Mapping)
                and value
                and all(isinstance(word, str) for word in value)
            ):
                if depth == MOST_LEVELS:
                    raise CheckpointError(f"dicts are nested in more than {MOST_LEVELS} levels")
                add(value, f"{name}.", depth + 1)
                continue
            if name in out:
                raise CheckpointError(f"two entries are called {name!r}")
            out[name] = value
            if len(out) > MOST_ENTRIES:
                raise CheckpointError(f"there are more than {MOST_ENTRIES:,} entries")

    add(state, "", 1)
    return out


@dataclass(frozen=True)
class Misfit:
    """Names that are missing, names that nobody expects (sorted), and names with both shapes where
    they differ.

    The first and the last are in the order of what is expected: the first tensor of a network tells
    most about its size.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]


def misfit(
    shapes: Mapping[str, tuple[int, ...]], *, expected: Mapping[str, tuple[int, ...]]
) -> Misfit:
    """What separates tensors of these `shapes` from the expected ones."""
    differing = [
        name for name in expected if name in shapes and tuple(shapes[name]) != tuple(expected[name])
    ]
    return Misfit(
        missing=tuple(name for name in expected if name not in shapes),
        extra=tuple(sorted(shapes.keys() - expected.keys())),
        misshapen=tuple(
            f"{name} has shape {tuple(shapes[name])}, expected {tuple(expected[name])}"
            for name in differing
        ),
    )


def check_keys(
    source: str,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    network: str = "this network",
    advice: str = "",
) -> None:
    """Raise `CheckpointError` unless names and shapes in `source` are exactly those that `network`
    (in words) expects.

    It names what is missing, unexpected or misshapen, and ends in `advice`.
    """
    found = misfit(shapes, expected=expected)
    problems = []
    if found.missing:
        problems.append(f"missing {len(found.missing)} key(s): {listed(found.missing)}")
    if found.extra:
        problems.append(f"{len(found.extra)} unexpected key(s): {listed(found.extra)}")
    if found.misshapen:
        problems.append(
            f"{len(found.misshapen)} tensor(s) of another shape:"
            f" {listed(found.misshapen, most=3, separator='; ')}"
        )
    if problems:
        raise CheckpointError(
            f"{source} does not fit {network}: {'; '.join(problems)}"
            + (f"; {advice}" if advice else "")
        )


def listed(names: Iterable[str], *, most: int = 8, separator: str = ", ") -> str:
    """The first `most` of many names, and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
