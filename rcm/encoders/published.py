"""Networks that transformers runs and others published under names of their own: one table of
tensors for each, a file checked against it before a tensor is read, and transformers' module filled
from it tensor by tensor.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import nn

from rcm.storage.state_dicts import check_keys, shapes_of
from rcm.storage.weight_files import WeightFile


class Row(NamedTuple):
    """A tensor: published name, names in transformers, published shape.

    Several names in transformers cut it along its first axis into equal parts; none means that
    transformers has no use for it. Leading axes of size one that transformers does not have fall
    away.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]


class PublishedShape(ABC):
    """Sizes of a network of `layers` blocks and width `dim`."""

    layers: int
    dim: int

    @abstractmethod
    def rows(self) -> Iterable[Row]:
        """Every tensor."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its published name."""
        return {row.ours: row.shape for row in self.rows()}


def repeated(block: Iterable[Row], layers: int, *, ours: str, theirs: str) -> Iterator[Row]:
    """The rows of `layers` blocks like `block`; its number stands for {} in `ours` and `theirs`."""
    for i, row in product(range(layers), block):
        yield Row(
            ours.format(i) + row.ours,
            tuple(theirs.format(i) + name for name in row.theirs),
            row.shape,
        )


def count_blocks(names: Iterable[str], begin: str) -> int:
    """How many different numbers stand for {} in `names` that begin like `begin`."""
    key = re.compile(re.escape(begin).replace(r"\{\}", r"(\d+)"))
    return len({int(found[1]) for name in names if (found := key.match(name))})


S = TypeVar("S", bound=PublishedShape)


@dataclass(frozen=True)
class PublishedWeights(Generic[S]):
    """A file that holds exactly one network; `names`: published name -> stored name."""

    file: WeightFile
    names: Mapping[str, str]
    shape: S


def checked(
    file: WeightFile, names: Mapping[str, str], *, shape_of: Callable[..., S], network: str
) -> PublishedWeights[S]:
    """The weights that `file` stores under `names`, of sizes that `shape_of` finds; none is read.

    `CheckpointError` names what is missing, left over, misshapen or no float of `network`.
    """
    stored = shapes_of(file)
    shapes = {name: stored[place] for name, place in names.items()}
    shape = shape_of(shapes, path=file.path)
    described = f"{network} of {shape.layers} layers and width {shape.dim}"
    check_keys(str(file.path), shapes=shapes, expected=shape.tensors(), network=described)
    file.require_floats(names.values())
    return PublishedWeights(file=file, names=names, shape=shape)


def fill(
    model: nn.Module,
    weights: PublishedWeights,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Give transformers' `model` (on meta) the parameters in the file; `tied`: second name ->
    first. Nothing is held twice: on the CPU, in a torch pickle's dtype, they are views of the
    mapped file.
    """
    axes, state = {name: tensor.ndim for name, tensor in model.state_dict().items()}, {}
    for row in weights.shape.rows():
        if not row.theirs:
            continue
        tensor = weights.file[weights.names[row.ours]].to(device).to(dtype)
        for name, part in zip(row.theirs, tensor.chunk(len(row.theirs)), strict=True):
            # a view would keep the other parts alive
            alone = part.clone() if len(row.theirs) > 1 else part
            state[name] = alone[(0,) * (alone.ndim - axes[name])]
    state |= {second: state[first] for second, first in (tied or {}).items()}
    model.load_state_dict(state, strict=True, assign=True)
