"""Streams over a quantised cache: attention reads what the codec restores, cold chunks exist as codes only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from rcm.nets.denoiser import Denoiser, Guided
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.8, 0.5), (0.5,)))
NOISY = replace(RECIPE, noisy_context=True)


class Restored:
    """A codec that stores what another one restores: the reference for the cache around it."""

    def __init__(self, codec: KVCodec) -> None:
        self.codec = codec

    def encode(self, x, *, side, layer):
        return self.codec.decode(self.codec.encode(x, side=side, layer=layer), side=side)

    def decode(self, blob, *, side):
        return blob.clone()

    def decode_into(self, blob, out, *, side):
        out.copy_(blob)

    def fork(self):
        return Restored(self.codec.fork())


def codec(dtype: str, smoothing: str = "none") -> KVCodec:
    side = SideSpec(dtype=dtype, smoothing=smoothing)
    return KVCodec(KVCodecSpec(key=side, value=side, qvg_clusters=4))


def run(model, spec: StreamSpec, count: int = 6) -> tuple[torch.Tensor, Session]:
    session = Session(model, None, condition(tiny_config(), dtype=torch.float32), spec)
    return torch.cat([session.step().latents for _ in range(count)], dim=2), session


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32")).eval_params()


@pytest.mark.parametrize("recipe", [RECIPE, NOISY], ids=["clean", "noisy"])
@pytest.mark.parametrize("policy", [SlidingWindow(3, 1), InfinityRope(blocks=3, sinks=1, horizon=8)], ids=["window", "relative"])
@pytest.mark.parametrize(
    ("dtype", "options"), [("fp8", {}), ("int8", {}), ("int4", {}), ("int2", {"smoothing": "qvg"})], ids=str
)
@pytest.mark.parametrize(("hot", "guided"), [(0, False), (1, True)])
def test_streams_attend_to_what_the_codec_restores(denoiser, dtype, options, policy, recipe, hot, guided):
    model = Guided(denoiser, condition(tiny_config(), batch=1, seed=9, dtype=torch.float32), 2.0) if guided else denoiser
    spec = StreamSpec(recipe, (4, HEIGHT, WIDTH), batch=2, policy=policy, hot_chunks=hot)
    found, session = run(model, replace(spec, kv_codec=codec(dtype, **options)))
    expected, _ = run(model, replace(spec, kv_codec=Restored(codec(dtype, **options))))
    assert torch.equal(found, expected)
    plain, _ = run(model, spec)
    error = float((found - plain).norm() / plain.norm())
    assert 0 < error < {"fp8": 0.2, "int8": 0.2, "int4": 0.6, "int2": 1.5}[dtype]
    state, following = session.snapshot(), session.step().latents
    session.restore(state)
    assert torch.equal(session.step().latents, following)


def test_a_restarted_stream_forgets_the_centres_of_the_last_one(denoiser):
    spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, policy=SlidingWindow(3), kv_codec=codec("int2", smoothing="qvg"))
    first, session = run(denoiser, spec)
    session.restart()
    assert torch.equal(torch.cat([session.step().latents for _ in range(6)], dim=2), first)
