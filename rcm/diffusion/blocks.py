"""Block patterns (c1-1, c3-3, c1-4, any): how latent frames are grouped into blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rcm.core.errors import ConfigError

_NAME = re.compile(r"c(\d+)-(\d+)")


@dataclass(frozen=True)
class BlockPattern:
    """[first | chunk | chunk | ...] latent frames of an autoregressive block (Causal-rCM section
    4.1).

    Frames attend freely inside a block, and to earlier blocks. `ConfigError` for a size below 1: 0
    marks template experiments, in which the pattern was never chosen.
    """

    first: int
    chunk: int

    def __post_init__(self) -> None:
        for knob, value in (("first_chunk_t", self.first), ("chunk_t", self.chunk)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{knob}={value!r} must be an integer number of latent frames")
            if value < 1:
                unset = " (0 means unset)" if value == 0 else ""
                raise ConfigError(
                    f"{knob}={value}{unset}: a block needs at least 1 latent frame; set {knob} or"
                    " use an experiment with a pattern suffix such as _c1-1, _c3-3 or _c1-4"
                )

    @classmethod
    def parse(cls, name: str) -> BlockPattern:
        """The pattern called "c<first>-<chunk>"; `ConfigError` on another form or a zero."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"block pattern {name!r} is not of the form c<first>-<chunk>, e.g. c1-1, c3-3 or"
                " c1-4"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        """The name `parse` accepts, e.g. "c1-4"."""
        return f"c{self.first}-{self.chunk}"

    def num_blocks(self, num_frames: int) -> int:
        """Blocks of `num_frames` latent frames; `ConfigError` unless whole blocks fill up."""
        rest = num_frames - self.first
        if rest < 0 or rest % self.chunk:
            below = self.first + max(rest, 0) // self.chunk * self.chunk
            above = below if rest < 0 else below + self.chunk
            fits = str(below) if below == above else f"{below} or {above}"
            raise ConfigError(
                f"num_frames={num_frames} does not split into a first block of {self.first} and"
                f" blocks of {self.chunk} ({self.name}); nearest state_t that fits: {fits}, or"
                " change first_chunk_t / chunk_t"
            )
        return 1 + rest // self.chunk

    def frames_before(self, block: int) -> int:
        """First latent frame of `block`, which counts from 0; `ValueError` if it is negative."""
        if block < 0:
            raise ValueError(f"block index must be >= 0, got {block}")
        return 0 if block == 0 else self.first + (block - 1) * self.chunk

    def bounds(self, num_frames: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) frames of every block, in order; raises as `num_blocks`."""
        return tuple(
            (self.frames_before(i), self.frames_before(i + 1))
            for i in range(self.num_blocks(num_frames))
        )

    def block_of_frame(self, num_frames: int) -> tuple[int, ...]:
        """Block index of every frame, length `num_frames`; raises as `num_blocks`."""
        return tuple(
            i for i, (start, stop) in enumerate(self.bounds(num_frames)) for _ in range(start, stop)
        )
