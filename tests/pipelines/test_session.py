"""Sessions on a tiny network: fixed-length rollouts, windows against an explicit mask, snapshots,
prompts, ends.
"""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.kernels.masks import BlockCausal
from rcm.nets.kv_rewrite import rewrite
from rcm.nets.layout import TokenLayout
from rcm.nets.positions import at_frames
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamCancelled, StreamSpec
from rcm.pipelines.streaming import stream_video
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.frames import cached_frames
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.noise import ChunkNoise
from rcm.rollout.recipe import SamplingRecipe
from rcm.worlds.toy_codec import ToyCodec
from tests.support.tiny_nets import GRID, HEIGHT, WIDTH, condition, tiny_config

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.8, 0.5), (0.5,)))
NOISY = replace(RECIPE, noisy_context=True)
LATENT = (4, HEIGHT, WIDTH)


def opened(denoiser, spec: StreamSpec, *, cond=None, codec=None, **options) -> Session:
    return Session(denoiser, codec, condition(tiny_config()) if cond is None else cond, replace(spec, batch=2), **options)


def spec(recipe: SamplingRecipe = RECIPE, **options) -> StreamSpec:
    return StreamSpec(recipe, LATENT, **options)


def latents(session: Session, count: int | None = None) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in itertools.islice(session, count)], dim=2)


@pytest.mark.parametrize("name", ["c1-1", "c3-3", "c1-3"])
def test_an_endless_session_begins_like_a_bounded_one_bit_by_bit(denoiser, name):
    recipe = replace(RECIPE, pattern=name)
    frames = recipe.blocks.frames_before(4)
    whole = latents(opened(denoiser, spec(recipe, num_frames=frames)))
    window = SlidingWindow(blocks=4)
    assert torch.equal(latents(opened(denoiser, spec(recipe, policy=window)), 4), whole)


@pytest.mark.parametrize("recipe", [RECIPE, NOISY], ids=["clean", "noisy"])
@pytest.mark.parametrize(
    ("name", "blocks", "sinks"), [("c1-1", 3, 0), ("c1-1", 3, 1), ("c1-1", 1, 0), ("c3-3", 2, 1), ("c1-3", 3, 1), ("c3-1", 3, 1)]
)
@torch.no_grad()
def test_a_wrapping_window_equals_recomputation_with_an_explicit_mask(denoiser, recipe, name, blocks, sinks):
    """Every pass again without any cache: [contexts so far; noisy chunk] packed, each block
    attending through window and sinks.
    """
    recipe = replace(recipe, pattern=name)
    session = opened(denoiser, spec(recipe, policy=SlidingWindow(blocks, sinks)))
    chunks = [chunk.latents.double() for chunk in itertools.islice(session, 8)]
    assert session.loop.cache.num_chunks <= blocks + sinks
    pattern, cond, noise = recipe.blocks, condition(tiny_config()), ChunkNoise((2, *LATENT), seed=0, dtype=torch.float64, device="cpu")
    context, times = [], []
    for block in range(8):
        plan = recipe.plan(block)
        mask = BlockCausal(pattern, plan.stop, GRID[0] * GRID[1], window=blocks, sinks=sinks)
        layout = TokenLayout(GRID, tuple(range(plan.stop)), mask, (plan.start, plan.stop))
        x = noise.start(slice(plan.start, plan.stop)) * plan.times[0]
        for step, (t, t_next) in enumerate(itertools.pairwise(plan.times)):
            packed = torch.cat([*context, x], dim=2)
            stamp = torch.cat([*times, torch.full((2, plan.stop - plan.start), t, dtype=torch.float64)], dim=1)
            last = x, t
            x0 = x - t * denoiser.velocity(packed, stamp, cond, layout)
            x = (1 - t_next) * x0 + t_next * noise.step(step, slice(plan.start, plan.stop)) if t_next else x0
        torch.testing.assert_close(chunks[block], x.float().double(), rtol=0, atol=2e-6)
        kept, t = last if plan.commit == "last_input" else (x, 0.0)
        context.append(kept)
        times.append(torch.full((2, plan.stop - plan.start), t, dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_a_stream_may_be_stepped_in_and_out_of_modes_of_torch(denoiser, mode):
    def run(within) -> torch.Tensor:
        with within():
            session = opened(denoiser, spec(policy=SlidingWindow(2)), prefix=torch.ones(1, 4, 1, HEIGHT, WIDTH).requires_grad_())
            found = [session.step()]
        state = session.snapshot()
        with within():
            session.restart(seed=3)
            session.step()
        session.restore(state)
        session.set_condition(condition(tiny_config(), seed=4), mode="recache")
        found += [session.step(), session.step()]
        with within():
            found.append(session.step())
        assert not any(chunk.frames.requires_grad or chunk.frames.is_inference() for chunk in found)
        return torch.cat([chunk.frames for chunk in found], dim=2)

    assert torch.equal(run(mode), run(torch.no_grad))


@pytest.mark.parametrize("options", [{"num_frames": 5}, {"policy": SlidingWindow(2)}, {"num_frames": 5, "noise": "video"}])
def test_a_restarted_session_is_a_new_one(denoiser, options):
    session = opened(denoiser, spec(**options))
    first = latents(session, 5)
    session.restart(seed=7)
    assert torch.equal(latents(session, 5), latents(opened(denoiser, spec(seed=7, **options)), 5))
    session.restart(condition(tiny_config()), seed=0)
    assert torch.equal(latents(session, 5), first)


def test_look_ahead_changes_nothing_but_the_order_of_work(denoiser):
    plain = latents(opened(denoiser, spec(num_frames=5)))
    assert torch.equal(latents(opened(denoiser, spec(num_frames=5, look_ahead=True))), plain)


def test_prompts_change_at_a_chunk_boundary_and_the_latest_wins(denoiser):
    other = condition(tiny_config(), seed=5)
    session = opened(denoiser, spec(policy=SlidingWindow(3)))
    first = latents(session, 2)
    early, late = session.set_condition(condition(tiny_config(), seed=6)), session.set_condition(other)
    assert early.superseded and late.applied_at is None
    rest = latents(session, 2)
    assert (early.applied_at, late.applied_at) == (None, 2)
    untouched = opened(denoiser, spec(policy=SlidingWindow(3)))
    assert torch.equal(latents(untouched, 2), first) and not torch.equal(latents(untouched, 2), rest)
    ahead = opened(denoiser, spec(policy=SlidingWindow(3), look_ahead=True))
    latents(ahead, 2)
    receipt = ahead.set_condition(other)
    latents(ahead, 2)
    assert receipt.applied_at == 3, "one chunk was under way"


def test_recaching_sees_no_more_than_was_seen_of_a_past_that_is_kept(denoiser):
    """In two layers a block knows of the one before it alone, which is entered anew either way."""

    def after_a_change(keep: bool) -> torch.Tensor:
        session = opened(denoiser, spec(num_frames=8, policy=SlidingWindow(2, keep=keep)))
        latents(session, 5)
        session.set_condition(condition(tiny_config(), seed=5), mode="recache")
        return latents(session, 1)

    torch.testing.assert_close(after_a_change(True), after_a_change(False))


class Merging(CachePolicy):
    """Makes one chunk of everything once there are three."""

    def capacity_frames(self, pattern):
        return 60

    def after(self, branches, chunk):
        if branches[0].num_chunks == 3:
            ids = [held.id for held in branches[0].chunks]
            rewrite(
                branches[0],
                ids,
                [at_frames(range(cached_frames(branches[0])), GRID)],
                lambda _, keys, values: (keys.clone(), values.clone()),
            )


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_refused_recache_changes_nothing_and_loses_no_chunk(denoiser, look_ahead):
    session, untouched = (opened(denoiser, spec(policy=Merging(), look_ahead=look_ahead)) for _ in range(2))
    got = [session.step() for _ in range(4)]
    receipt, refusals = session.set_condition(condition(tiny_config(), seed=5), mode="recache"), 0
    while len(got) < 8:
        try:
            got.append(session.step())
        except ConfigError:
            refusals += 1
    assert refusals == 1 and receipt.applied_at is None and "mode='keep'" in receipt.refused
    assert torch.equal(torch.cat([chunk.latents for chunk in got], dim=2), latents(untouched, 8))


@pytest.mark.parametrize("options", [{"policy": SlidingWindow(3, 1)}, {"num_frames": 6, "noise": "video"}], ids=["chunk", "video"])
def test_a_snapshot_is_taken_up_after_a_restart_with_another_seed_and_prefix(denoiser, options):
    first = torch.randn(1, 4, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    session = opened(denoiser, spec(NOISY, **options), prefix=first)
    latents(session, 1)
    state = session.snapshot()
    following = latents(session, 4)
    session.restart(seed=7)
    latents(session, 2)
    first.zero_()  # the stream holds its own
    session.restore(state)
    assert torch.equal(latents(session, 4), following) and session.spec.seed == 0


def test_one_condition_and_one_prefix_serve_the_whole_batch(denoiser):
    first, cond = torch.randn(1, 4, 1, HEIGHT, WIDTH), condition(tiny_config(), batch=1, seed=5)
    alone = opened(denoiser, spec(policy=SlidingWindow(3)), cond=cond, prefix=first)
    given = opened(denoiser, spec(policy=SlidingWindow(3)), cond=cond.expand(2), prefix=first.expand(2, -1, -1, -1, -1))
    for session, other in (
        (alone, condition(tiny_config(), batch=1, seed=6)),
        (given, condition(tiny_config(), batch=1, seed=6).expand(2)),
    ):
        session.step()
        session.set_condition(other)
    assert torch.equal(latents(alone, 2), latents(given, 2))
    with pytest.raises(ConfigError, match="batch of 1 or 2"):
        alone.restart(condition(tiny_config(), batch=3), seed=9)
    with pytest.raises(ConfigError, match=r"prefix must be \[1 or 2, 4, k"):
        alone.restart(seed=9, prefix=torch.zeros(2, 4, 1, HEIGHT + 2, WIDTH))
    assert alone.spec.seed == 0 and alone.next_block == 3, "a refused restart changes nothing"


def test_a_step_that_failed_is_not_passed_over(denoiser, monkeypatch):
    """A stream whose pass died would go on with a hole in its past."""
    session = opened(denoiser, spec(policy=SlidingWindow(3)))
    whole, state = latents(session, 2), session.snapshot()
    monkeypatch.setattr(session.loop, "denoise", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.step()
    monkeypatch.undo()
    for use in (session.step, session.snapshot, session.settle):
        with pytest.raises(StreamCancelled, match=r"division by zero.*restart\(\)"):
            use()
    session.restore(state)
    third = session.step().latents
    session.restart()
    assert torch.equal(latents(session, 3), torch.cat([whole, third], dim=2))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"hot_chunks": -1}, "hot_chunks=-1"),
        ({"hot_chunks": 2}, "hot_chunks=2 keeps chunks of a quantised cache plain, .* give kv_codec, or 0"),
        ({"keys": "rope"}, "keys='rope'"),
    ],
)
def test_impossible_storage_is_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        spec(policy=SlidingWindow(2), **wrong)


def test_streams_without_end_are_bounded(denoiser, monkeypatch):
    for wrong, message in (
        ({}, "without end needs a policy"),
        ({"noise": "video", "policy": SlidingWindow(2)}, "give num_frames"),
        ({"num_frames": 3, "batch": 0}, "at least 1 video"),
        ({"num_frames": 3, "noise": "film"}, "'film'"),
        ({"num_frames": 3, "graphs": "yes"}, "'yes'"),
    ):
        with pytest.raises(ConfigError, match=message):
            spec(**wrong)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        opened(denoiser, spec(num_frames=2, graphs="on"))
    with pytest.raises(ConfigError, match="switch mode"):
        opened(denoiser, spec(num_frames=2)).set_condition(condition(tiny_config()), mode="mix")
    session = opened(denoiser, spec(policy=SlidingWindow(2)))
    sizes = set()
    monkeypatch.setattr(denoiser.net, "config", replace(denoiser.net.config, max_frames=8))
    for _ in range(40):
        session.step()
        sizes.add(session.num_bytes())
    assert len(sizes) == 1 and session.loop.cache.chunks[-1].positions.frames[0] > denoiser.net.config.max_frames


def test_the_last_chunk_ends_it(denoiser):
    session = opened(denoiser, spec(num_frames=2))
    assert [session.step() is None for _ in range(4)] == [False, False, True, True] and session.ended


def test_a_closed_session_with_a_decoder_holds_nothing_and_may_be_closed_again(denoiser, monkeypatch):
    session = opened(denoiser, spec(num_frames=3), codec=ToyCodec())
    monkeypatch.setattr(type(ToyCodec().stream()), "num_bytes", lambda _: 7)
    assert session.num_bytes() == 7, "the decoder's; the cache is made for the first chunk"
    for _ in range(2):
        session.close()
        assert session.num_bytes() == 0 and not session.may_draw


def test_opening_and_closing_leaks_nothing(denoiser):
    def cycle() -> None:
        with opened(denoiser, spec(policy=SlidingWindow(2))) as session:
            session.step()

    cycle()
    gc.collect()
    before = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
    for _ in range(50):
        cycle()
    gc.collect()
    assert sum(isinstance(x, torch.Tensor) for x in gc.get_objects()) <= before + 2


def test_first_frame_comes_alone(denoiser):
    def made(**options) -> list:
        generator, shape = torch.Generator().manual_seed(1), (2, 4, 6, HEIGHT, WIDTH)
        recipe = replace(RECIPE, pattern="c3-3")
        return list(stream_video(denoiser, None, condition(tiny_config()), recipe, shape=shape, generator=generator, **options))

    whole, parts = made(), made(first_alone=True)
    assert [c.latents.shape[2] for c in parts] == [1, 2, 3] and [c.block for c in parts] == [0, 0, 1]
    assert torch.equal(torch.cat([c.latents for c in parts], dim=2), torch.cat([c.latents for c in whole], dim=2))


def test_policies_keep_everything_by_default():
    assert CachePolicy().capacity_frames(RECIPE.blocks) is None and CachePolicy().fresh().protected(()) == ()
