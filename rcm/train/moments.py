"""Forms in which AdamW's moments are kept between updates; an update computes with wide ones.

Full precision takes 8 bytes per trained number, bfloat16 4, blocks of 8-bit codes about 2. A form
is a function of a tensor and, where it rounds at random, of a generator that the update seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rcm.core.errors import ConfigError, first_line

States = Literal["float32", "bfloat16", "int8", "float8"]
BLOCK = 256
"""Numbers of a row that share a scale, at most."""
SMALLEST_BLOCK = 32
"""Rows that do not divide into blocks of as many stay in full precision."""
Kept = dict[str, Tensor]
"""Tensors of one moment by the end of their name: "" the numbers, "_scale" their blocks'."""


class Form(Protocol):
    """How one moment of a parameter is kept."""

    def blank(self, shard: Tensor) -> Kept:
        """Zero for a parameter's `shard`, on its device."""
        ...

    def opened(self, kept: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The moment in the dtype of the shard `like`; may be `kept` itself."""
        ...

    def close(self, kept: Mapping[str, Tensor], value: Tensor, generator: torch.Generator) -> None:
        """Write `value`, which `opened` gave and the update changed, into `kept`."""
        ...


def forms(states: States, *, knob: str = "optimizer.states") -> tuple[Form, Form]:
    """Of the first and of the second moment. `ConfigError` naming the package that is missing, and
    `knob`, where the states were asked for.
    """
    if states in ("int8", "float8"):
        kind = _torchao(states, knob)
        return Blockwise(states, kind, signed=True), Blockwise(states, kind, signed=False)
    form: Form = HalfWidth() if states == "bfloat16" else Full()
    return form, form


class Full:
    """As wide as the parameters: nothing is lost."""

    def blank(self, shard: Tensor) -> Kept:
        """Zeros."""
        return {"": torch.zeros_like(shard, requires_grad=False)}

    def opened(self, kept: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Itself."""
        return kept[""]

    def close(self, kept: Mapping[str, Tensor], value: Tensor, generator: torch.Generator) -> None:
        """Nothing to do."""


class HalfWidth:
    """bfloat16, rounded at random so that the mean of the roundings is the number: increments far
    below half a step of bfloat16, as of the second moment at beta 0.99, are not lost.
    """

    def blank(self, shard: Tensor) -> Kept:
        """Zeros."""
        return {"": torch.zeros_like(shard, dtype=torch.bfloat16, requires_grad=False)}

    def opened(self, kept: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Widened, exactly."""
        return kept[""].to(like.dtype)

    def close(self, kept: Mapping[str, Tensor], value: Tensor, generator: torch.Generator) -> None:
        """Rounded."""
        kept[""].copy_(stochastic_bfloat16(value, generator))


def stochastic_bfloat16(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x` as one of the two bfloat16 numbers around it, each with a probability that makes `x` the
    mean. Numbers of bfloat16, infinities among them, stay.
    """
    bits = x.float().view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    rounded = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32)
    # the payload of a NaN may carry into another number
    return rounded.masked_fill_(x.isnan(), torch.nan).to(torch.bfloat16)


class Blockwise:
    """8-bit codes with a scale per block of a row (Dettmers et al. 2021, arXiv 2110.02861), encoded
    and decoded by torchao. `signed`: the first moment.

    Blocks end with their row, so that shards of rows hold whole blocks on any number of ranks.
    Parameters of one axis, and rows that do not divide into blocks, stay in full precision.
    """

    def __init__(self, states: Literal["int8", "float8"], kind: Any, *, signed: bool) -> None:
        self.states, self.signed, self._full = states, signed, Full()
        self._kind = kind  # torchao's class
        self._tables: dict[torch.device, Tensor] = {}

    def blank(self, shard: Tensor) -> Kept:
        """Codes of the shape of `shard`, scales with the blocks of a row as last axis."""
        block = math.gcd(shard.shape[-1], BLOCK) if shard.ndim > 1 else 0
        if block < SMALLEST_BLOCK:
            return self._full.blank(shard)
        codes = torch.uint8 if self.states == "int8" else torch.float8_e4m3fn
        rows = (*shard.shape[:-1], shard.shape[-1] // block)
        return {
            "": torch.zeros_like(shard, dtype=codes, requires_grad=False),
            "_scale": torch.zeros(rows, dtype=torch.float32, device=shard.device),
        }

    def opened(self, kept: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Decoded."""
        if "_scale" not in kept:
            return self._full.opened(kept, like)
        return self._over(kept).dequantize().to(like.dtype) if like.numel() else kept[""].to(like)

    def close(self, kept: Mapping[str, Tensor], value: Tensor, generator: torch.Generator) -> None:
        """Encoded, to the nearest code."""
        if "_scale" in kept and value.numel():
            self._over(kept).copy_(value.float())

    def _over(self, kept: Mapping[str, Tensor]) -> Any:
        """torchao's tensor over the memory of `kept`."""
        codes, scale = kept[""], kept["_scale"].view(-1)
        if self.states == "float8":
            return self._kind(codes, scale)
        if codes.device not in self._tables:
            whole = self._kind.zeros((BLOCK,), self.signed, BLOCK, device=codes.device)
            self._tables[codes.device] = whole.qmap
        return self._kind(codes, scale, self._tables[codes.device], self.signed)


def _torchao(states: str, knob: str) -> Any:
    """torchao's class of such states."""
    try:
        if states == "int8":
            from torchao.optim.subclass_8bit import OptimState8bit

            return OptimState8bit
        from torchao.optim.subclass_fp8 import OptimStateFp8
    except ImportError as error:
        raise ConfigError(
            f"{knob}={states} needs the package torchao ({first_line(error)}):"
            f" pip install 'rcm[lowbit]', or choose {knob}=bfloat16"
        ) from error
    return OptimStateFp8
