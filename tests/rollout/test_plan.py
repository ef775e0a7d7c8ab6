"""Rollout plans against the hand-written tables of Causal_rCM.md section 6 and
docs/reference/sampling.md#chunks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.noise import VideoNoise
from rcm.rollout.plan import ContextRule, StepSchedule, block_plan, training_plan
from rcm.rollout.recipe import SamplingRecipe

C11, C33, C14 = BlockPattern(1, 1), BlockPattern(3, 3), BlockPattern(1, 4)
FOUR, TWO = (15 / 16, 5 / 6, 5 / 8), (5 / 6,)


def test_step_count_cycle_of_four_two():
    schedule = StepSchedule((FOUR, TWO))
    counts = [tuple(p.num_steps for p in training_plan(C33, 9, schedule, index=i)) for i in range(5)]
    assert counts == [(1, 1, 1), (2, 2, 2), (3, 2, 2), (4, 2, 2), (1, 1, 1)]


def test_training_times_are_prefixes_from_exactly_one():
    schedule = StepSchedule((FOUR, TWO))
    first, second = training_plan(C33, 6, schedule, index=2)
    assert first.times == (1.0, 15 / 16, 5 / 6, 0.0)
    assert second.times == (1.0, 5 / 6, 0.0)
    assert training_plan(C33, 6, schedule, index=0)[0].times == (1.0, 0.0)


def test_training_context_is_last_input_at_the_maximum_and_renoised_below_it():
    schedule = StepSchedule((FOUR, (5 / 8,)))
    rule = ContextRule(noisy=True, start_chunk=1)
    full = training_plan(C33, 9, schedule, index=3, context=rule)
    assert [(p.commit, p.commit_time) for p in full] == [("clean", 0.0), ("last_input", 5 / 8), ("last_input", 5 / 8)]
    short = training_plan(C33, 9, schedule, index=0, context=rule)
    assert [(p.commit, p.commit_time) for p in short] == [("clean", 0.0), ("renoised", 5 / 8), ("renoised", 5 / 8)]


def test_one_step_chunks_with_noisy_context_leave_pure_noise():
    """Decision A13: an empty schedule makes the context time 1; configurations warn, the plan says
    so.
    """
    plan = training_plan(C33, 6, StepSchedule((FOUR, ())), index=3, context=ContextRule(True, 1))
    assert (plan[1].commit, plan[1].commit_time) == ("last_input", 1.0)


def test_inference_frames_and_repeated_last_entry():
    plans = SamplingRecipe("few_step", "c1-4", mids=(FOUR, TWO), sigma_max=1600).plans(9)
    assert [(p.block, p.start, p.stop, p.num_steps) for p in plans] == [(0, 0, 1, 4), (1, 1, 5, 2), (2, 5, 9, 2)]
    assert all(p.times[0] == 1600 / 1601 for p in plans)


def test_given_blocks_shift_the_schedule_but_not_the_context_rule():
    recipe = SamplingRecipe("few_step", "c1-1", mids=(FOUR, TWO), noisy_context=True, noisy_context_start_chunk=1)
    plans = recipe.plans(4, prefix_blocks=1)
    assert [(p.block, p.num_steps, p.commit) for p in plans] == [(1, 4, "last_input"), (2, 2, "last_input"), (3, 2, "last_input")]


def test_ode_plan_repeats_one_grid():
    plans = [block_plan(C14, block, (1.0, 0.5, 0.0)) for block in (0, 2, 10**6)]
    assert {p.times for p in plans} == {(1.0, 0.5, 0.0)}
    assert [(p.start, p.stop) for p in plans] == [(0, 1), (5, 9), (4 * 10**6 - 3, 4 * 10**6 + 1)]


@pytest.mark.parametrize(
    ("steps", "schedules", "message"),
    [
        ((), ((0.5,),), "without"),
        ((2, 1), ((0.5,),), "one schedule per entry"),
        ((3,), ((0.5,),), "Need 2 mid_t values for 3 steps"),
        ((0,), (), "at least 1"),
    ],
)
def test_bad_step_lists(steps, schedules, message):
    with pytest.raises(ConfigError, match=message):
        StepSchedule.from_lists(steps=steps, schedules=schedules, default_mids=FOUR)


def test_extra_mid_times_are_cut():
    assert StepSchedule.from_lists(steps=(4, 2), schedules=(), default_mids=FOUR).mids == (FOUR, FOUR[:1])


def test_training_refuses_growing_step_counts():
    with pytest.raises(ConfigError, match="non-increasing"):
        StepSchedule((TWO, FOUR)).require_non_increasing("steps")
    StepSchedule((FOUR, FOUR, TWO)).require_non_increasing("steps")


def test_recipe_round_trip_and_contradictions():
    trained = SamplingRecipe(kind="few_step", pattern="c3-3", mids=(FOUR, TWO))
    assert SamplingRecipe.from_dict(trained.to_dict()) == trained and "window" not in trained.to_dict()
    assert trained.with_steps(4, 1).contradictions(trained) == []
    other = SamplingRecipe(kind="few_step", pattern="c1-1", mids=(FOUR,), noisy_context=True)
    with pytest.raises(ConfigError, match="pattern.*c3-3.*c1-1"):
        other.require_compatible(trained)
    assert len(other.require_compatible(trained, allow=True)) == 2
    with pytest.raises(ConfigError, match="unknown keys"):
        SamplingRecipe.from_dict({"kind": "few_step", "pattern": "c1-1", "steps": 4})


def test_a_recipe_records_what_a_chunk_was_trained_to_see():
    trained = SamplingRecipe(kind="few_step", pattern="c3-3", mids=(FOUR, TWO), window=3, sinks=1)
    assert SamplingRecipe.from_dict(trained.to_dict()) == trained == trained.with_steps(4, 2)
    assert trained.policy == SlidingWindow(3, 1)
    # bounded, so it may be without end
    assert StreamSpec(trained, (4, 2, 2)).policy == SlidingWindow(3, 1)
    assert type(StreamSpec(trained, (4, 2, 2), num_frames=6, policy=CachePolicy()).policy) is CachePolicy
    with pytest.raises(ConfigError, match="window: the checkpoint was trained for 3, the sampler asks for None"):
        replace(trained, window=None, sinks=0).require_compatible(trained)
    for changes, message in (({"window": 0}, "window=0 blocks"), ({"window": None}, "sinks=1 are what stays visible beyond a window")):
        with pytest.raises(ConfigError, match=message):
            replace(trained, **changes)


def test_other_step_counts_keep_the_trained_times():
    """A 2-step checkpoint was trained to finish later chunks from TWO's time, not from the first
    time of chunk 0.
    """
    trained = SamplingRecipe(kind="few_step", pattern="c3-3", mids=(FOUR, TWO))
    assert trained.with_steps(4, 2).mids == (FOUR, TWO)
    assert trained.with_steps(2, 2).mids == (FOUR[:1], TWO)
    assert trained.with_steps(1).mids == ((),)
    assert trained.with_steps(4, 3).mids == (FOUR, FOUR[:2])  # TWO is too short for 3 steps
    assert trained.with_steps(4, 2, schedules=(FOUR, (0.4,))).mids == (FOUR, (0.4,))
    with pytest.raises(ConfigError, match="--steps_per_chunk"):
        trained.with_steps(5, knob="--steps_per_chunk")


def test_noise_of_a_video_with_given_frames_in_the_release_s_order():
    """The start draw leaves given frames out, the step draws do not; context noise comes last."""
    shape, source = (1, 2, 4, 1, 1), torch.Generator().manual_seed(3)
    plans = SamplingRecipe("few_step", "c1-1", mids=((0.5,),)).plans(4, prefix_blocks=1)
    noise = VideoNoise.for_plans(plans, shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64, device="cpu")
    start, *steps = torch.randn(1, 2, 3, 1, 1, generator=source), *(torch.randn(shape, generator=source) for _ in range(2))
    context = torch.randn(1, 2, 1, 1, 1, generator=source)
    assert torch.equal(noise.start(slice(1, 3)), start[:, :, 0:2].double())
    assert all(torch.equal(noise.step(i, slice(1, 3)), steps[i][:, :, 1:3].double()) for i in range(2))
    assert torch.equal(noise.context(slice(0, 1)), context.double())


def test_many_steps_may_leave_noisy_context():
    recipe = SamplingRecipe("ode", "c1-1", ode_steps=4, noisy_context=True, noisy_context_start_chunk=1)
    first, second = recipe.plan(0), recipe.plan(1)
    assert (first.commit, first.commit_time) == ("clean", 0.0)
    assert (second.commit, second.commit_time) == ("last_input", second.times[-2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepSchedule((0.5,)), "mids=.* must be a tuple, of which each is a tuple"),
        (lambda: StepSchedule((("0.5",),)), "mids=.* must be a tuple"),
        (
            lambda: StepSchedule.from_lists(steps=[True], schedules=[], default_mids=(0.5,)),
            r"steps_per_chunk\[0\]=True must be a whole number",
        ),
        (
            lambda: StepSchedule.from_lists(steps=[1, 1.5], schedules=[], default_mids=(0.5,)),
            r"steps_per_chunk\[1\]=1.5 must be a whole number",
        ),
        (lambda: ContextRule("no"), "noisy='no' must be True or False"),
        (lambda: ContextRule(True, 1.5), "start_chunk=1.5 must be a whole number"),
        (lambda: SamplingRecipe("ode", "c1-1", sigma_max=-1.0), "sigma_max=-1.0 must be positive"),
        (lambda: SamplingRecipe("ode", "c1-1", ode_steps=0), "ode_steps=0 must be at least 1"),
        (lambda: SamplingRecipe("ode", "c1-1", noisy_context_start_chunk=-1), "noisy_context_start_chunk=-1 must be at least 0"),
        (lambda: SamplingRecipe("ode", "c1-1", shift=1e-300), "shift=1e-300 must be in 0.001 to 1000"),
    ],
)
def test_settings_of_a_wrong_kind_or_size_are_refused_before_a_plan_is_made(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
