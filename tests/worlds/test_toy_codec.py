from __future__ import annotations

import math

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.encoders.codec import LatentCodec, LatentStream
from rcm.worlds.toy_codec import ToyCodec, cosine_basis
from rcm.worlds.toy_world import ToyWorld


def noise_video(frames: int, size: int = 8, dtype=torch.float64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(frames), dtype=dtype)


@pytest.mark.parametrize(
    ("codec", "frames"), [(ToyCodec(), 17), (ToyCodec(4, 2), 17), (ToyCodec(3, 4), 7), (ToyCodec(1, 1), 5), (ToyCodec(2, 2), 1)]
)
def test_decode_inverts_encode(codec, frames):
    video = noise_video(frames)
    latents = codec.encode(video)
    height, width = codec.latent_size(8, 8)
    assert latents.shape == (2, codec.latent_channels, codec.latent_frames_for(frames), height, width)
    assert codec.frames_for(latents.shape[2]) == frames
    assert (codec.decode(latents) - video).abs().max() < 1e-13
    single = video.float()
    assert (codec.decode(codec.encode(single)) - single).abs().max() < 5e-6


def test_channels_are_the_cosine_coefficients_of_their_block():
    """Each latent against the definition: the inner product of its 2x2x2 block with a product of
    cosines, scaled.
    """
    codec, video = ToyCodec(gain=0.7, boost=3.0, centre=0.25), noise_video(5)
    latents = codec.encode(video)
    rows = torch.tensor(cosine_basis(2), dtype=torch.float64)
    assert torch.allclose(rows @ rows.T, torch.eye(2, dtype=torch.float64))
    block = video[:, :, 3:5, 4:6, 2:4] - 0.25  # latent frame 2 holds frames 3 and 4; cell (2, 1)
    channel = 0
    for i in range(2):
        for j in range(2):
            for k in range(2):
                value = torch.einsum("bcfhw,f,h,w->bc", block, rows[i], rows[j], rows[k]) * 0.7 * 3.0 ** (i + j + k)
                assert torch.allclose(latents[:, channel : channel + 3, 2, 2, 1], value)
                channel += 3


def test_first_frame_stands_alone():
    codec, video = ToyCodec(gain=1.0, centre=0.0), noise_video(5)
    latents = codec.encode(video)
    assert latents[:, 12:, 0].abs().max() < 1e-14  # no temporal frequency
    generated = latents.clone()
    generated[:, 12:, 0] += 1  # a network's output has some there: the lone frame does not see it
    assert torch.allclose(codec.decode(generated), video)
    changed = video.clone()
    changed[:, :, 0] += 1
    assert torch.equal(codec.encode(changed)[:, :, 1:], latents[:, :, 1:])
    means = video[:, :, 0].unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean(dim=(-1, -3))
    assert torch.allclose(latents[:, :3, 0], means * math.sqrt(8))


@pytest.mark.parametrize("codec", [ToyCodec(), ToyCodec(4, 1)])
@pytest.mark.parametrize("chunks", [[1] * 9, [3, 3, 3], [1, 4, 4], [9]])
def test_streamed_chunks_equal_one_shot(codec, chunks):
    """Bit for bit, on latents that no video has (generated ones have energy everywhere)."""
    latents = torch.randn(2, codec.latent_channels, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    stream = codec.stream()
    parts = [stream.decode_chunk(part) for part in latents.split(chunks, dim=2)]
    assert torch.equal(torch.cat(parts, dim=2), codec.decode(latents))
    assert parts[0].shape[2] == codec.frames_for(chunks[0])


def test_default_latents_are_somewhat_larger_than_the_noise():
    world, codec = ToyWorld(), ToyCodec()
    latents = codec.encode(world.render(world.scenes(256, seed=0)))
    assert 1.2 < float(latents[:, :, 1:].square().mean().sqrt()) < 2
    ground = codec.encode(torch.full((1, 3, 3, 8, 8), world.config.background))
    assert ground.abs().max() < 1e-5


def test_it_is_a_latent_codec():
    assert isinstance(ToyCodec(), LatentCodec)
    assert isinstance(ToyCodec().stream(), LatentStream)


def test_sizes_that_do_not_fold_are_refused():
    codec = ToyCodec()
    with pytest.raises(ConfigError, match="choose num_frames=15 or 17"):
        codec.encode(noise_video(16))
    with pytest.raises(ConfigError, match="spatial_stride=2"):
        codec.encode(torch.zeros(1, 3, 5, 8, 7))
    with pytest.raises(ConfigError, match=r"\[B, 3, F, H, W\]"):
        codec.encode(torch.zeros(1, 4, 5, 8, 8))
    with pytest.raises(ConfigError, match=r"\[B, 24, T, h, w\]"):
        codec.decode(torch.zeros(1, 12, 5, 8, 8))
    with pytest.raises(ConfigError, match="at least one latent frame"):
        codec.frames_for(0)
    with pytest.raises(ConfigError, match="positive"):
        ToyCodec(temporal_stride=0)
    with pytest.raises(ConfigError, match="gain=nan must be a finite number"):
        ToyCodec(gain=float("nan"))
    with pytest.raises(ConfigError, match="got torch.uint8"):
        codec.encode(torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="T, h, w"):
        codec.decode(torch.zeros(1, 24, 0, 4, 4))
