"""Several sessions of one tiny model: turns, orders, memory, and the end of one among others."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.pipelines.from_checkpoint import LoadedModel, open_checkpoint
from rcm.pipelines.session_pool import Order, PoolFull, SessionPool, predicted_bytes
from rcm.rollout.eviction.mem_rope import MemRope
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.support.tiny_checkpoint import PROMPT, write_checkpoint
from tests.support.wan_vae_cases import small_codec, small_latents

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((15 / 16, 5 / 6), (5 / 6,)))
OTHER = "a blue square moving up"
WINDOW = {"policy": SlidingWindow(3, 1)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    job = tmp_path_factory.mktemp("pool") / "job"
    write_checkpoint(job, RECIPE)
    return open_checkpoint(job)


def latents(pool: SessionPool, turns: int, **options) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for _ in range(turns):
        turn = pool.turn(**options)
        assert turn is not None and turn.error is None
        found.setdefault(turn.seat.name, []).append(turn.chunk.latents)
    return found


def test_turns_are_fair_and_streams_are_those_of_sessions_alone(model):
    pool = SessionPool(model, max_sessions=3)
    seats = [pool.open([PROMPT], seed=seed, **WINDOW) for seed in (1, 2, 3)]
    found = latents(pool, 12)
    assert {name: len(chunks) for name, chunks in found.items()} == {"s1": 4, "s2": 4, "s3": 4}
    for seed, seat in zip((1, 2, 3), seats, strict=True):
        with model.open([PROMPT], seed=seed, **WINDOW) as alone:
            assert all(torch.equal(mine, alone.step().latents) for mine in found[seat.name])
    only = latents(pool, 4, ready=lambda seat: seat is not seats[0])
    assert {name: len(chunks) for name, chunks in only.items()} == {"s2": 2, "s3": 2}
    assert pool.turn(lambda seat: False) is None
    assert pool.close_all() == 3 and pool.turn() is None


def test_limits_are_told_with_numbers_and_closing_frees(model):
    pool = SessionPool(model, max_sessions=2)
    first = pool.open([PROMPT], **WINDOW)
    pool.open([PROMPT], **WINDOW)
    with pytest.raises(PoolFull, match="session limit reached: 2 of 2 are open"):
        pool.open([PROMPT], **WINDOW)
    pool.close(first)
    pool.close(first)
    pool.open([PROMPT], **WINDOW)

    one = first.predicted
    tight = SessionPool(model, memory_budget_bytes=2 * one, max_sessions=9)
    seats = [tight.open([PROMPT], **WINDOW) for _ in range(2)]
    with pytest.raises(PoolFull, match=r"a session of .* MiB does not fit: .* of .* MiB are taken"):
        tight.open([PROMPT], **WINDOW)
    latents(tight, 12)
    assert all(seat.session.num_bytes() == seat.predicted == one for seat in seats), "what was predicted is what a full window takes"
    larger = seats[0].steer(Order("policy", SlidingWindow(5, 1)))
    fits = seats[1].steer(Order("policy", SlidingWindow(2, 1)))
    latents(tight, 2)
    assert larger.state == "refused" and "does not fit" in larger.reason and seats[0].take == 0
    assert fits.state == "applied" and (fits.applied_at, fits.take) == (0, 1) and seats[1].predicted == one * 3 // 4
    tight.close_all()
    gc.collect()
    assert tight.num_bytes() == 0


def test_guided_sessions_count_both_caches(model):
    plain, guided = (model.open([PROMPT], recipe=replace(RECIPE, guidance=g), **WINDOW) for g in (1.0, 3.0))
    assert predicted_bytes(model, guided) == 2 * predicted_bytes(model, plain)
    for _ in range(5):
        guided.step()
    assert guided.num_bytes() == predicted_bytes(model, guided)


@pytest.mark.parametrize("keys", ["post_rope", "pre_rope"])
def test_codes_of_attention_in_fp8_are_counted(model, keys):
    plain, coded = (model.open([PROMPT], recipe=RECIPE, keys=keys, attention=a, **WINDOW) for a in ("net", "fp8"))
    for _ in range(5):
        coded.step()
    assert coded.num_bytes() == predicted_bytes(model, coded) > predicted_bytes(model, plain)


@pytest.mark.parametrize("mode", ["keep", "recache"])
def test_the_latest_order_of_each_kind_wins_and_says_where_it_applies(model, mode):
    pool = SessionPool(model)
    seat = pool.open([PROMPT], seed=5, **WINDOW)
    latents(pool, 3)
    told: list[tuple[str, str]] = []
    orders = [Order("prompt", [text], mode=mode, told=lambda o: told.append((o.value[0], o.state))) for text in ("a red cross", OTHER)]
    steps = Order("recipe", lambda recipe: recipe.with_steps(1), part="steps")
    first = Order("recipe", lambda recipe: replace(recipe, noisy_context_start_chunk=9), part="context")
    seat.steer(first)
    threads = [threading.Thread(target=seat.steer, args=(order,)) for order in (orders[0], steps)]
    for thread in threads:
        thread.start()
        thread.join()
    seat.steer(orders[1])
    got = latents(pool, 2)["s1"]
    assert told == [("a red cross", "superseded"), (OTHER, "applied")]
    assert (orders[1].applied_at, steps.applied_at, first.applied_at) == (3, 3, 3)
    assert seat.session.spec.recipe == replace(RECIPE.with_steps(1), noisy_context_start_chunk=9)
    with model.open([PROMPT], seed=5, **WINDOW) as alone:
        for _ in range(3):
            alone.step()
        alone.set_condition(model.condition([OTHER]), mode=mode)
        assert alone.set_recipe(RECIPE.with_steps(1)) == 3
        assert all(torch.equal(mine, alone.step().latents) for mine in got)


@pytest.mark.parametrize("given", [0, 1])
def test_a_new_seed_begins_another_take_under_the_latest_prompt(model, given):
    """Behind the same given frames."""
    channels, _, *sides = model.latent_shape
    prefix = torch.ones(1, channels, given, *sides) if given else None
    pool = SessionPool(model)
    seat = pool.open([PROMPT], seed=5, prefix=prefix, **WINDOW)
    latents(pool, 2)
    seed, prompt = seat.steer(Order("seed", 8)), seat.steer(Order("prompt", [OTHER]))
    got = latents(pool, 3)["s1"]
    assert (seed.applied_at, prompt.applied_at, seat.take, prompt.take) == (0, 0, 1, 1)
    with model.open([OTHER], seed=8, prefix=prefix, **WINDOW) as alone:
        assert all(torch.equal(mine, alone.step().latents) for mine in got)


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        (Order("prompt", ["one two three four five six seven eight nine"]), "words"),
        (Order("recipe", replace(RECIPE, pattern="c3-3")), "pattern='c1-1'"),
        (Order("recipe", lambda recipe: recipe.with_steps(0)), "steps"),
    ],
)
def test_an_impossible_order_is_refused_and_the_stream_goes_on(model, order, sentence):
    pool = SessionPool(model)
    seat = pool.open([PROMPT], seed=5, **WINDOW)
    first = latents(pool, 1)["s1"]
    seat.steer(order)
    got = first + latents(pool, 2)["s1"]
    assert order.state == "refused" and sentence in order.reason
    with model.open([PROMPT], seed=5, **WINDOW) as alone:
        assert all(torch.equal(mine, alone.step().latents) for mine in got)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_prompt_that_is_refused_late_does_not_end_the_seat(model, look_ahead):
    """Whether a window can be entered anew is known at the chunk boundary only."""
    options = {"policy": MemRope(1, 1), "look_ahead": look_ahead}
    pool = SessionPool(model)
    seat = pool.open([PROMPT], **options)
    before = latents(pool, 6)["s1"]
    order = seat.steer(Order("prompt", [OTHER], mode="recache"))
    after = latents(pool, 2)["s1"]
    assert order.state == "refused" and "mode='keep'" in order.reason and seat.prompts == [PROMPT]
    with model.open([PROMPT], **options) as alone:
        assert all(torch.equal(mine, alone.step().latents) for mine in [*before, *after])


def test_a_session_that_fails_ends_alone(model, monkeypatch):
    pool = SessionPool(model)
    bad, good = (pool.open([PROMPT], **WINDOW) for _ in range(2))
    latents(pool, 2)
    monkeypatch.setattr(bad.session, "step", lambda: 1 / 0)
    waiting = bad.steer(Order("prompt", [OTHER]))
    turn = pool.turn()
    assert turn.seat is bad and isinstance(turn.error, ZeroDivisionError) and bad.closed
    assert waiting.state == "refused"
    assert set(latents(pool, 3)) == {good.name}
    assert bad.steer(Order("seed", 1)).state == "refused"
    assert pool.num_bytes() == good.predicted


def test_all_orders_of_a_session_that_fails_are_told(model, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("no memory\nat all")

    def broken(order: Order) -> None:
        told.append((order.what, order.state, order.reason))
        raise RuntimeError("whoever listens is gone")

    pool, told = SessionPool(model), []
    seat = pool.open([PROMPT], **WINDOW)
    for what, value in (("prompt", [OTHER]), ("seed", 3), ("recipe", RECIPE)):
        seat.steer(Order(what, value, told=broken))
    monkeypatch.setattr(seat.session, "restart", full)
    assert pool.turn().error is seat.failed and seat.closed and not pool.seats
    ended = ("refused", "the session ended first")
    assert told == [("seed", "refused", "RuntimeError: no memory"), ("recipe", *ended), ("prompt", *ended)]
    with pytest.raises(ConfigError, match="what='polcy' is not one of"):
        Order("polcy", SlidingWindow(2))


def test_a_bounded_session_ends_with_a_turn_without_a_chunk(model):
    pool = SessionPool(model)
    seat = pool.open([PROMPT], num_frames=5)
    assert len(latents(pool, 3)["s1"]) == 3
    turn = pool.turn()
    assert turn.chunk is None and turn.error is None and seat.session.ended


def test_a_session_keeps_what_another_recipe_would_break(model):
    with model.open([PROMPT], num_frames=5, noise="video") as session, pytest.raises(ConfigError, match="noise='chunk'"):
        session.set_recipe(RECIPE.with_steps(1))


@pytest.mark.parametrize("tile", [None, 4])
def test_a_decoder_is_predicted_to_the_byte(tile):
    codec, cells = small_codec(tile=tile), (6, 8)
    stream = codec.stream()
    predicted = stream.bytes_for(batch=2, cells=cells)
    stream.decode_chunk(small_latents(1, batch=2, cells=cells))
    assert stream.num_bytes() == predicted > 0
