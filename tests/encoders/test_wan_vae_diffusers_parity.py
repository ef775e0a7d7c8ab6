"""Encode and decode equal an independent implementation, AutoencoderKLWan, through the key map; in
a module of its own for its import.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rcm.encoders.wan_vae import DEVIATIONS, MEANS
from rcm.encoders.wan_vae_weights import diffusers_name, original_names
from tests.support.wan_vae_cases import BASE_DIM, small_codec, small_latents, small_video, to_diffusers

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pair():
    codec = small_codec()
    peer = diffusers.AutoencoderKLWan(base_dim=BASE_DIM, z_dim=16).eval()
    peer.load_state_dict(to_diffusers(codec.vae.state_dict()), strict=True)
    return codec, peer


def published(name: str, peer) -> Tensor:
    """Latent statistics as the peer's own configuration gives them."""
    return torch.tensor(getattr(peer.config, name)).view(1, 16, 1, 1, 1)


def test_statistics_are_the_published_ones(pair):
    _, peer = pair
    assert list(MEANS) == peer.config.latents_mean
    assert list(DEVIATIONS) == peer.config.latents_std


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decode(pair, frames):
    codec, peer = pair
    latents = small_latents(frames, batch=2)
    with torch.no_grad():
        theirs = peer.decode(latents * published("latents_std", peer) + published("latents_mean", peer)).sample
    ours = codec.decode(latents)
    assert ours.shape == theirs.shape == (2, 3, 4 * frames - 3, 32, 48)
    assert theirs.abs().max() < 1, "the peer clamps; a clamped picture would prove less"
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode(pair, frames):
    codec, peer = pair
    video = small_video(frames, batch=2)
    with torch.no_grad():
        means = peer.encode(video).latent_dist.mode()
    theirs = (means - published("latents_mean", peer)) / published("latents_std", peer)
    ours = codec.encode(video)
    assert ours.shape == theirs.shape == (2, 16, 1 + frames // 4, 4, 6)
    assert (ours - theirs).abs().max() <= 1e-5


def test_key_map_is_a_bijection_and_round_trips(pair):
    codec, peer = pair
    ours = list(codec.vae.state_dict())
    assert {diffusers_name(key) for key in ours} == set(peer.state_dict())
    theirs = [diffusers_name(key) for key in ours]
    assert original_names(theirs, expected=ours) == dict(zip(theirs, ours, strict=True))
