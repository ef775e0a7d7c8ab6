"""The toy world as data in memory: what `build_dataset` writes to shards, without the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from rcm.core.errors import ConfigError
from rcm.data.batch import LatentBatch
from rcm.encoders.codec import LatentCodec
from rcm.encoders.text_protocol import TextEncoder
from rcm.worlds.toy_world import ToyWorld

_ENCODE_BATCH = 128


class ToyLatents:
    """A `loader.Source` of scenes 0 .. num - 1, encoded once: 57 MB for 4096 default videos.
    `ConfigError` for more than this machine has memory for.
    """

    def __init__(
        self, world: ToyWorld, codec: LatentCodec, text: TextEncoder, *, num: int, seed: int = 0
    ) -> None:
        one = world.scenes(1, seed=seed)
        made = codec.encode(world.render(one)), text.encode(world.captions(one))
        need = 2 * num * sum(part.nbytes for part in made)  # in parts, then as one
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > have:
            raise ConfigError(
                f"{num} videos of the toy world take {need >> 30} GiB while they are made, this"
                f" machine has {have >> 30}; lower dataloader_train.num_videos"
            )
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
