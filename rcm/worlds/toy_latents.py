"""The toy world as data in memory: what `build_dataset` writes to shards, without the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rcm.data.batch import LatentBatch
from rcm.encoders.codec import LatentCodec
from rcm.encoders.text_protocol import TextEncoder
from rcm.worlds.toy_world import ToyWorld

_ENCODE_BATCH = 128


class ToyLatents:
    """A `loader.Source` of scenes 0 .. num - 1, encoded once: 57 MB for 4096 default videos."""

    def __init__(
        self, world: ToyWorld, codec: LatentCodec, text: TextEncoder, *, num: int, seed: int = 0
    ) -> None:
        scenes = world.scenes(num, seed=seed)
        parts = [slice(start, start + _ENCODE_BATCH) for start in range(0, num, _ENCODE_BATCH)]
        self._latents = torch.cat([codec.encode(world.render(scenes[part])) for part in parts])
        self._prompts = world.captions(scenes)
        self._text = text.encode(self._prompts)
        self._name = f"toy-{seed}-{num}-{world.config}-{codec}-{text}"

    def __len__(self) -> int:
        return len(self._prompts)

    def fingerprint(self) -> str:
        """Names what the samples are made from."""
        return self._name

    def captions(self) -> Iterator[str]:
        """Every caption, in order."""
        return iter(self._prompts)

    def fetch(self, indices: Sequence[int]) -> LatentBatch:
        """The batch of scenes `indices`."""
        rows = torch.as_tensor(list(indices))
        return LatentBatch(
            self._latents[rows],
            self._text[rows],
            [self._prompts[i] for i in indices],
            [f"{i:09d}" for i in indices],
        )
