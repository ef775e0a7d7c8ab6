"""Snapshots: a fresh session goes on bit by bit, whatever the cache; one that was opened otherwise
refuses before it changes. One thread steps a stream.
"""

from __future__ import annotations

import itertools
import sys
import threading
from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.denoiser import Denoiser, Guided
from rcm.pipelines.decode_lane import Decoding
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamCancelled, StreamSpec
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.worlds.toy_codec import ToyCodec
from tests.pipelines.test_session_codec import CODECS, NOISY, RECIPE
from tests.pipelines.test_stream_finite import Decoder
from tests.rollout.test_eviction import POLICIES
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net

LATENT = (4, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32")).eval_params()


def cond(seed: int = 0):
    return condition(tiny_config(), dtype=torch.float32, seed=seed)


def opened(model, recipe=RECIPE, codec=None, **options) -> Session:
    options.setdefault("policy", SlidingWindow(3, 1))
    return Session(model, codec, cond(), StreamSpec(recipe, LATENT, batch=2, **options))


def chunks(session: Session, count: int) -> torch.Tensor:
    return torch.cat([session.step().latents for _ in range(count)], dim=2)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("everything", "toy")])
def test_a_fresh_session_goes_on_bit_by_bit(denoiser, policy):
    """Twice from one snapshot, of which what goes on changes nothing; over coded caches, too:
    test_stream_pairs.py.
    """
    session, fresh = (opened(denoiser, policy=POLICIES[policy][0]) for _ in range(2))
    chunks(session, 6)
    state = session.snapshot()
    following = chunks(session, 4)
    for _ in range(2):
        fresh.restore(state)
        assert torch.equal(chunks(fresh, 4), following)


@pytest.mark.parametrize("name", ["int4", "int2 qvg", "official"])
def test_a_snapshot_of_codes_serves_twice(denoiser, name):
    """Codes are shared, what a codec learned is not."""
    session = opened(denoiser, NOISY, kv_codec=CODECS[name])
    chunks(session, 4)
    state = session.snapshot()
    following = chunks(session, 3)
    for _ in range(2):
        session.restore(state)
        assert torch.equal(chunks(session, 3), following)


@pytest.mark.parametrize(
    "options", [{}, {"kv_codec": CODECS["int2 qvg"]}, {"num_frames": 9, "noise": "video"}], ids=["plain", "coded", "video"]
)
def test_a_stream_cancelled_at_any_pass_goes_on_elsewhere_from_its_snapshot(denoiser, options):
    """One generator serves them in turn."""
    options = {**options, **({"policy": CachePolicy(), "generator": torch.Generator().manual_seed(4)} if "noise" in options else {})}
    alone, passes = opened(denoiser, **options), 0
    chunks(alone, 2)
    expected = chunks(alone, 2)
    alone.close()
    while True:
        session, seen = opened(denoiser, **options), itertools.count()
        if "noise" in options:
            session.restart(seed=4)
        chunks(session, 2)
        state, at = session.snapshot(), passes

        def interrupt(session=session, seen=seen, at=at, may_go_on=session.loop.interrupt) -> None:
            if next(seen) == at:
                session.cancel()
            may_go_on()

        session.loop.interrupt = interrupt
        try:
            whole = torch.equal(chunks(session, 2), expected)
        except StreamCancelled:
            whole = False
        session.close()
        assert session.num_bytes() == 0
        with pytest.raises(StreamCancelled, match="open another"):
            session.step()
        with opened(denoiser, **options) as fresh:
            fresh.restore(state)
            assert torch.equal(chunks(fresh, 2), expected)
        if whole:
            break
        passes += 1
    assert passes == 2 * 2 + 2, "steps, and contexts of the chunks before"


@pytest.mark.parametrize("recipe", [RECIPE, NOISY], ids=["clean", "noisy"])
def test_a_fresh_session_recaches_what_the_snapshot_held(denoiser, recipe):
    """The context of the newest chunk is remembered under its id in the cache that was taken up."""
    session, fresh = opened(denoiser, recipe), opened(denoiser, recipe)
    chunks(session, 5), chunks(fresh, 2)
    fresh.restore(session.snapshot())
    for one in (session, fresh):
        one.set_condition(cond(seed=5), mode="recache")
    assert torch.equal(chunks(fresh, 4), chunks(session, 4))


OTHERS = {
    "network": ({}, "another network"),
    "guided": ({}, "another guidance: none, here 2"),
    "codec": ({"codec": ToyCodec()}, "another decoder: none, here ToyCodec"),
    "negative": ({}, "another negative prompt: .*, here"),
    "times": ({}, "another dtype of times: torch.float32, here torch.bfloat16"),
    "recipe": ({"recipe": replace(RECIPE, pattern="c2-1")}, "another pattern: c1-1, here c2-1"),
    "window": ({"policy": SlidingWindow(4, 1)}, "another policy: SlidingWindow.blocks=3, sinks=1.*here .*blocks=4"),
    "policy": ({"policy": InfinityRope(3, 1, 8)}, "another policy"),
    "keys": ({"keys": "pre_rope"}, "another keys: post_rope, here pre_rope"),
    "attention": ({"attention": "fp8"}, "another attention: net, here fp8"),
    "coded": ({"kv_codec": CODECS["int4"]}, "another kv_codec: none, here KVCodecSpec"),
    "noise": ({"num_frames": 20, "noise": "video"}, "another noise: chunk, here video"),
    "length": ({"num_frames": 4}, "after 5 latent frames, the stream ends at 4"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_session_that_was_opened_otherwise_refuses_and_goes_on(denoiser, what):
    options, told = OTHERS[what]
    model = denoiser
    if what == "guided":
        model = Guided(denoiser, condition(tiny_config(), batch=1, seed=9, dtype=torch.float32), 2.0)
    if what == "network":
        model = Denoiser(tiny_net(dtype=torch.float32, seed=8), Precision.preset("fp32")).eval_params()
    if what == "times":
        model = Denoiser(denoiser.net, replace(denoiser.precision, time=torch.bfloat16))
    guides = [condition(tiny_config(), batch=1, seed=seed, dtype=torch.float32) for seed in (8, 9)]
    first, model = (Guided(denoiser, guide, 2.0) for guide in guides) if what == "negative" else (denoiser, model)
    maker = opened(first)
    chunks(maker, 5)
    other, alone = opened(model, **options), opened(model, **options)
    if what == "codec":  # which no latents of this network fit
        with pytest.raises(ConfigError, match=told):
            other.restore(maker.snapshot())
        return
    other.step(), alone.step()
    with pytest.raises(ConfigError, match=told):
        other.restore(maker.snapshot())
    assert torch.equal(other.step().latents, alone.step().latents)


@pytest.mark.parametrize("recipe", [RECIPE, NOISY], ids=["clean", "noisy"])
@pytest.mark.parametrize("options", [{}, {"settled": True}, {"kv_codec": CODECS["int4"]}], ids=["plain", "settled", "coded"])
def test_a_longer_stream_goes_on_where_a_shorter_one_ended(denoiser, recipe, options):
    """With the last chunk in its past."""
    short, long, whole = (opened(denoiser, recipe, num_frames=count, **options) for count in (5, 9, 9))
    chunks(short, 5), chunks(whole, 5)
    short.settle()
    in_its_step = recipe.noisy_context and "kv_codec" in options
    assert short.loop.newest == (4 if in_its_step else 3), "no pass for a context that this stream does not read"
    long.restore(short.snapshot())
    assert short.step() is None
    torch.testing.assert_close(chunks(long, 4), chunks(whole, 4), rtol=0, atol=1e-5)
    long.restore(short.snapshot())
    assert not long.set_condition(cond(seed=5), mode="recache").refused and long.step().block == 5


def test_drawn_noise_ends_with_its_video(denoiser):
    short, long = (opened(denoiser, num_frames=count, noise="video") for count in (5, 9))
    chunks(short, 2)
    with pytest.raises(ConfigError, match="another noise: video of 5 frames, here video of 9 frames"):
        long.restore(short.snapshot())


def test_what_was_handed_out_may_be_written_to(denoiser):
    """Snapshots hold chunks that were made ahead, or not handed out as a whole."""
    session = opened(denoiser, replace(RECIPE, pattern="c2-1"), look_ahead=True, first_alone=True)
    for _ in range(2):
        state = (session.step(), session.snapshot())[1]
        following = chunks(session, 2)
        for _ in range(2):
            session.restore(state)
            handed = [session.step().latents for _ in range(2)]
            assert torch.equal(torch.cat(handed, dim=2), following)
            for x in handed:
                x.zero_()
        session.restore(state)


@pytest.mark.parametrize("state", [None, {}, [], "state", {"seed": 1}])
def test_what_is_no_snapshot_is_refused(denoiser, state):
    with pytest.raises(ConfigError, match="state"):
        opened(denoiser).restore(state)


def test_a_restore_that_breaks_off_leaves_no_half_stream(denoiser):
    session = opened(denoiser)
    chunks(session, 3)
    whole = session.snapshot()
    with pytest.raises(TypeError):
        session.restore({**whole, "loop": None})
    with pytest.raises(StreamCancelled, match="failed"):
        session.step()
    session.restore(whole)
    assert session.step().block == 3


def test_one_thread_at_a_time(denoiser):
    """A second thread is refused while a step is under way, and the stream is as if it had not
    asked; closing waits for the step.
    """
    session, alone, told = opened(denoiser), opened(denoiser), []
    step = session.loop.advance

    def others(*arguments, **options):
        for name in ("step", "settle", "snapshot", "restart"):
            thread = threading.Thread(target=lambda name=name: told.append(refused(getattr(session, name))))
            thread.start()
            thread.join()
        return step(*arguments, **options)

    def refused(call) -> str:
        try:
            call()
        except ConfigError as error:
            return str(error)
        return "accepted"

    session.loop.advance = others
    assert torch.equal(chunks(session, 2), chunks(alone, 2))
    assert told and all("while another thread uses this stream" in sentence for sentence in told)
    session.loop.advance = step
    closing = threading.Thread(target=session.close)
    session.loop.interrupt = lambda: closing.is_alive() or closing.ident or closing.start() or session._course.require_open()
    with pytest.raises(StreamCancelled):
        chunks(session, 50)
    closing.join(timeout=120)
    assert not closing.is_alive() and session.num_bytes() == 0


def test_an_impossible_seed_leaves_the_stream_as_it_was(denoiser):
    session, alone = opened(denoiser), opened(denoiser)
    chunks(session, 3), chunks(alone, 3)
    for seed in (-1, 1.5, "7", True, 2**32, 10**5000):
        with pytest.raises(ConfigError, match="seed="):
            session.restart(seed=seed)
    assert torch.equal(session.step().latents, alone.step().latents)


def test_streams_of_several_threads_share_a_model(denoiser):
    """What a network keeps for its passes (rotary tables) is looked up while others replace it."""
    alone, found = chunks(opened(denoiser), 12), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: chunks(opened(denoiser), 12)})) for i in range(3)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(found) == 3 and all(torch.equal(one, alone) for one in found.values())


def same(a, b) -> bool:
    """Whether two values, nested as they may be, hold equal numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("everything", "toy")])
def test_all_that_a_policy_remembers_is_taken_up(denoiser, name):
    session, fresh = (opened(denoiser, policy=POLICIES[name][0]) for _ in range(2))
    chunks(session, 7)
    for wish in ("cut", "flush"):
        getattr(session.loop.canvas.policy, wish, lambda: None)()
    fresh.restore(session.snapshot())
    mine, theirs = (vars(one.loop.canvas.policy) for one in (fresh, session))
    assert same(mine, theirs)


@pytest.mark.parametrize("where", ["pass", "decoder", "looks", "pixels"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_stream_that_was_broken_off_makes_no_chunk_of_half_a_past(denoiser, monkeypatch, where, kind):
    """Nor with a decoder that missed a chunk."""

    def stop(*_, **__):
        raise kind("stop")

    session = opened(denoiser, codec=Decoder())
    state = (chunks(session, 3), session.snapshot())[1]
    target, name = {"pass": (session.loop, "denoise"), "decoder": (session._lane, "decode"),
                    "looks": (session._guard, "handed"), "pixels": (Decoding, "result")}[where]  # fmt: skip
    monkeypatch.setattr(target, name, stop)
    with pytest.raises(kind):
        session.step()
    monkeypatch.undo()
    with pytest.raises(StreamCancelled, match=f"failed .{kind.__name__}: stop.; restart"):
        session.step()
    session.restore(state)
    assert session.step().block == 3


def test_a_restart_that_was_broken_off_makes_no_chunk_of_another_video(denoiser, monkeypatch):
    session = opened(denoiser, codec=Decoder())
    whole, state = chunks(session, 3), session.snapshot()
    monkeypatch.setattr(session.loop, "restart", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.restart()
    monkeypatch.undo()
    with pytest.raises(StreamCancelled, match="failed .KeyboardInterrupt.*restart"):
        session.step()
    session.restore(state)
    assert session.step().block == 3
    session.restart()
    assert torch.equal(chunks(session, 3), whole)


def test_a_change_that_waits_is_part_of_the_snapshot(denoiser):
    session, fresh = opened(denoiser), opened(denoiser)
    chunks(session, 4)
    session.set_condition(cond(seed=5), mode="recache")
    fresh.restore(session.snapshot())
    found = chunks(fresh, 3)
    assert torch.equal(found, chunks(session, 3))
    unchanged = opened(denoiser)
    assert not torch.equal(found, chunks(unchanged, 7)[:, :, 4:])


def test_a_refusal_that_waits_belongs_to_the_stream_that_was_left(denoiser):
    session = opened(denoiser, policy=POLICIES["mem"][0], look_ahead=True)
    chunks(session, 8)
    state = session.snapshot()
    session.set_condition(cond(seed=5), mode="recache")
    session.step()
    session.restore(state)
    assert session.step().block == 8


def test_contexts_of_dropped_chunks_are_forgotten(denoiser):
    session = opened(denoiser)
    chunks(session, 12)
    assert len(session._steering._contexts) <= 4
