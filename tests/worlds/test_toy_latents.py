from __future__ import annotations

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.data.loader import Loader
from rcm.worlds.toy_codec import ToyCodec
from rcm.worlds.toy_latents import ToyLatents
from rcm.worlds.toy_text import ToyTextEncoder
from rcm.worlds.toy_world import ToyWorld


def test_samples_decode_to_their_captions_video():
    world, codec, text = ToyWorld(), ToyCodec(), ToyTextEncoder()
    source = ToyLatents(world, codec, text, num=150, seed=2)
    batch = source.fetch([149, 0, 3])
    scenes = world.scenes(150, seed=2)[torch.tensor([149, 0, 3])]
    assert batch.latents.shape == (3, 24, 9, 4, 4) and batch.cond.shape == (3, 8, 64)
    assert batch.prompts == world.captions(scenes)
    assert (codec.decode(batch.latents) - world.render(scenes)).abs().max() < 1e-5
    assert torch.equal(batch.cond, text.encode(batch.prompts))
    assert batch.keys == ["000000149", "000000000", "000000003"]


def test_it_feeds_a_loader_and_names_itself():
    parts = ToyWorld(), ToyCodec(), ToyTextEncoder()
    source = ToyLatents(*parts, num=16)
    assert next(Loader(source, batch_size=8)).batch_size == 8
    assert source.fingerprint() != ToyLatents(*parts, num=16, seed=1).fingerprint()


def test_more_videos_than_memory_are_refused_before_they_are_made():
    with pytest.raises(ConfigError, match=r"1000000000000 videos .* take \d+ GiB .* has \d+; lower dataloader_train.num_videos"):
        ToyLatents(ToyWorld(), ToyCodec(), ToyTextEncoder(), num=10**12)
