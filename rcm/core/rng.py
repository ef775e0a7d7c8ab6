"""Stateless random streams: every draw is a function of (seed, step, data rank, micro-batch,
purpose).

Nothing has to be saved for an exact resume, and ranks of one context-parallel group (equal data
rank) draw equal numbers without communication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from rcm.core.errors import ConfigError
from rcm.core.records import require_kind


def generator(
    *,
    seed: int,
    step: int,
    dp_rank: int,
    purpose: str,
    micro: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """Fresh generator at the start of the stream named by the key; equal keys give equal streams.

    `purpose` is a word such as "noise" or "time"; a second call with the same key starts the same
    stream again. The key is hashed, so neighbouring steps and ranks are unrelated. CPU and CUDA
    generators of one key produce different numbers, and torch's CPU generator uses the low 32 bits
    of the hash only. Raises `ValueError` on an empty purpose, `ConfigError` for a key that is no
    whole number.
    """
    if not purpose:
        raise ValueError(
            "generator(purpose=...) must be a non-empty word: it is what keeps two streams of one"
            " step apart"
        )
    numbers = {"seed": seed, "step": step, "dp_rank": dp_rank, "micro": micro}
    for name, number in numbers.items():
        require_kind(name, number, int)
    key = "\x1f".join((*(str(int(number)) for number in numbers.values()), purpose))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    # manual_seed takes a signed 64-bit integer: keep 63 bits.
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


SEEDS = 2**32
"""How many seeds a CPU generator tells apart: it takes 64 bits and uses the lower half."""


def require_seed(seed: int, *, knob: str, draws: int = 1) -> None:
    """ConfigError naming `knob` unless `seed` .. `seed + draws - 1` are seeds of which no two give
    the same numbers on any device.
    """
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not (whole and 0 <= seed <= SEEDS - max(draws, 1)):
        room = "" if draws <= 1 else f" with room for {draws} in a row"
        shown = seed if not whole or abs(seed) < 10**40 else "(a number of more than 40 digits)"
        raise ConfigError(
            f"{knob}{'' if knob.endswith('=') else ' '}{shown} must be a whole number from 0 to"
            f" {SEEDS - 1}{room}; choose another"
        )


def randn(
    shape: Sequence[int],
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Standard normal tensor of `shape`, drawn in float32 on the generator's device, then cast to
    `dtype` and moved to `device`.

    The float32 draw makes the numbers of a key the same in every precision (a float64 run sees the
    float32 noise). `device` None keeps the generator's device.
    """
    draw = torch.randn(
        tuple(shape), generator=generator, device=generator.device, dtype=torch.float32
    )
    return draw.to(device=generator.device if device is None else device, dtype=dtype)


@dataclass(frozen=True)
class StepRng:
    """The random streams of one micro-batch of one training step on one data rank; `device` is
    where the generators live.

    Holds only the key, so asking twice for a purpose restarts its stream: keep the generator when
    more draws of a purpose are needed.
    """

    seed: int
    step: int
    dp_rank: int
    micro: int = 0
    device: torch.device | str = "cpu"

    def generator(self, purpose: str) -> torch.Generator:
        """Fresh generator of the stream `purpose`; independent of every other purpose, step, rank
        and micro-batch.
        """
        return generator(
            seed=self.seed,
            step=self.step,
            dp_rank=self.dp_rank,
            micro=self.micro,
            purpose=purpose,
            device=self.device,
        )
