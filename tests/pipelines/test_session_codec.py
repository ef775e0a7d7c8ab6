"""Streams over a quantised cache: attention reads what the codec restores, cold chunks exist as
codes only.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.kv_coded import KVCodec as Protocolled
from rcm.pipelines import engine
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.support.rerun_loop import RerunLoop
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.8, 0.5), (0.5,)))
NOISY = replace(RECIPE, noisy_context=True)


class Restored(Protocolled):
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


def codec(dtype: str, smoothing: str = "none", **settings) -> KVCodec:
    side = SideSpec(dtype=dtype, smoothing=smoothing, group_size=4)
    return KVCodec(KVCodecSpec(key=side, value=side, qvg_clusters=4, **settings))


def run(model, spec: StreamSpec, count: int = 6) -> tuple[torch.Tensor, Session]:
    session = Session(model, None, condition(tiny_config(), dtype=torch.float32), spec)
    return torch.cat([session.step().latents for _ in range(count)], dim=2), session


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32")).eval_params()


@pytest.mark.parametrize(
    ("dtype", "options", "policy", "recipe"),
    [
        ("fp8", {}, SlidingWindow(3, 1), RECIPE),
        ("int8", {}, InfinityRope(blocks=3, sinks=1, horizon=8), RECIPE),
        ("int4", {}, InfinityRope(blocks=3, sinks=1, horizon=8), NOISY),
        ("int2", {"smoothing": "qvg"}, SlidingWindow(3, 1), NOISY),
    ],
)
def test_streams_attend_to_what_the_codec_restores(denoiser, dtype, options, policy, recipe):
    """Of chunks that stay plain while they are the newest; test_stream_pairs.py has the others."""
    model = Guided(denoiser, condition(tiny_config(), batch=1, seed=9, dtype=torch.float32), 2.0)
    spec = StreamSpec(recipe, (4, HEIGHT, WIDTH), batch=2, policy=policy)
    found, session = run(model, replace(spec, kv_codec=codec(dtype, **options), hot_chunks=1))
    expected, _ = run(model, replace(spec, kv_codec=Restored(codec(dtype, **options)), hot_chunks=1))
    assert torch.equal(found, expected)
    plain, _ = run(model, spec)
    error = float((found - plain).norm() / plain.norm())
    assert 0 < error < {"fp8": 0.2, "int8": 0.2, "int4": 0.6, "int2": 1.5}[dtype]
    state, following = session.snapshot(), session.step().latents
    session.restore(state)
    assert torch.equal(session.step().latents, following)


CODECS = {
    "int4": codec("int4"),
    "int2 qvg": codec("int2", "qvg"),
    "int8 hadamard, keys plain": KVCodec(KVCodecSpec(key=SideSpec(), value=SideSpec("int8", "hadamard"))),
    "release": codec("int2", "qvg", mode="release"),
    "official": codec("int2", "qvg", mode="official"),
    "one map per head, cold": codec("int2", "qvg", qvg_share_assignments=False, qvg_stages=2, qvg_warm_start=False),
}


@pytest.mark.parametrize(
    ("name", "pattern", "recipe", "policy", "keys", "guided"),
    [
        ("int4", "c1-3", RECIPE, SlidingWindow(3, 1), "pre_rope", False),
        ("int2 qvg", "c1-1", RECIPE, SlidingWindow(3, 1), "pre_rope", True),
        ("int2 qvg", "c1-3", NOISY, InfinityRope(blocks=3, sinks=1, horizon=9), None, False),
        ("int8 hadamard, keys plain", "c3-3", NOISY, SlidingWindow(2), "post_rope", True),
        ("release", "c1-1", RECIPE, SlidingWindow(3), "pre_rope", False),
        ("official", "c1-1", RECIPE, SlidingWindow(3), "post_rope", False),
        ("one map per head, cold", "c1-1", RECIPE, None, "pre_rope", False),
    ],
)
def test_captured_passes_find_codes_as_device_data(denoiser, monkeypatch, name, pattern, recipe, policy, keys, guided):
    """Passes that were made once serve later chunks, whose codes lie elsewhere, those that encode,
    too: equal to the eager loop bit by bit through fill-up, wrap, a change of prompt, a snapshot
    taken up again and another video.
    """
    model = Guided(denoiser, condition(tiny_config(), batch=1, seed=9, dtype=torch.float32), 2.0) if guided else denoiser
    recipe = replace(recipe, pattern=pattern)
    bounds = {"policy": policy} if policy is not None else {"num_frames": recipe.blocks.frames_before(9)}
    spec = StreamSpec(recipe, (4, HEIGHT, WIDTH), batch=2, keys=keys, kv_codec=CODECS[name], **bounds)

    def story() -> tuple[torch.Tensor, Session]:
        first, session = run(model, spec, 5)
        session.set_condition(condition(tiny_config(), dtype=torch.float32, seed=5))
        state, then = session.snapshot(), [session.step().latents for _ in range(2)]
        session.restore(state)
        again = [session.step().latents for _ in range(2)]
        assert all(map(torch.equal, then, again))
        session.restart()
        other = [session.step().latents for _ in range(4)]
        return torch.cat([first, *then, *other], dim=2), session

    expected, _ = story()
    monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    found, session = story()
    counts = session.loop.counts
    assert torch.equal(found, expected)
    sizes = 2 if pattern == "c1-3" else 1
    assert counts["replayed"] > counts["captured"] > 0 and counts["eager"] <= 4 * sizes, counts


def test_a_restarted_stream_forgets_the_centres_of_the_last_one(denoiser):
    spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, policy=SlidingWindow(3), kv_codec=codec("int2", smoothing="qvg"))
    first, session = run(denoiser, spec)
    session.restart()
    assert torch.equal(torch.cat([session.step().latents for _ in range(6)], dim=2), first)


@pytest.mark.parametrize("name", ["int4", "int2 qvg"])
def test_chunks_that_bear_the_ids_of_others_are_found_where_they_lie(denoiser, monkeypatch, name):
    """A restart, and a snapshot taken up again, between passes that look alike: of a pattern with
    two chunk sizes the second size was last placed over chunk 0 of the video before.
    """
    recipe = replace(RECIPE, pattern="c1-3")
    spec = StreamSpec(recipe, (4, HEIGHT, WIDTH), batch=2, num_frames=4, kv_codec=CODECS[name])
    expected, _ = run(denoiser, replace(spec, seed=7), 2)
    monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    _, session = run(denoiser, spec, 2)
    session.restart(seed=7)
    first, state = session.step().latents, session.snapshot()
    found = [torch.cat([first, session.step().latents], dim=2)]
    session.restore(state)
    found.append(torch.cat([first, session.step().latents], dim=2))
    assert session.loop.counts["replayed"] > 0
    assert all(torch.equal(latents, expected) for latents in found)


def test_a_chunk_that_stays_plain_is_not_coded_by_a_captured_pass(denoiser, monkeypatch):
    """After a restart the first chunk's form is known, and it sees no plain chunk."""
    spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, policy=SlidingWindow(3), kv_codec=codec("int4"), hot_chunks=1)
    expected, _ = run(denoiser, spec, 4)
    monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    _, session = run(denoiser, spec, 4)
    session.restart()
    assert torch.equal(torch.cat([session.step().latents for _ in range(4)], dim=2), expected)
