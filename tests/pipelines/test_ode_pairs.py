"""Stored trajectories lie on the teacher's ODE, are functions of their number alone, and a causal
teacher's blocks do not mix.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.core.rng import generator
from rcm.data.fake import FakeLatents
from rcm.diffusion.time import per_frame
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Guided
from rcm.nets.layout import TokenLayout
from rcm.pipelines.from_checkpoint import LoadedModel, open_checkpoint
from rcm.pipelines.ode_pairs import KD_TIMES, ODEPairBuilder, TrajectoryPlan, numbered_noise, walk
from rcm.pipelines.text_to_video import whole_latents
from rcm.samplers.schedule import shifted_grid
from tests.support.linear_gaussian import LinearGaussian
from tests.support.tiny_checkpoint import FEW_STEP, LATENT_SHAPE, MANY_STEP, PROMPT, STUDENT, TEACHER, TEXT, write_checkpoint

PROMPTS = [PROMPT, "a blue square moving up"]
CAUSAL = replace(TEACHER, pattern="c3-3", ode_steps=3)
EXACT = {"rtol": 0, "atol": 1e-5}  # float32 storage of float64 states


def opened(folder, recipe) -> LoadedModel:
    write_checkpoint(folder, recipe)
    return open_checkpoint(folder, precision="fp64")


@pytest.fixture(scope="module")
def bidirectional(tmp_path_factory) -> LoadedModel:
    return opened(tmp_path_factory.mktemp("bidirectional"), MANY_STEP)


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> LoadedModel:
    return opened(tmp_path_factory.mktemp("causal"), CAUSAL)


def data(num: int = 3) -> FakeLatents:
    return FakeLatents(num=num, latent_shape=LATENT_SHAPE, text_shape=(8, TEXT.text_dim))


def plan(steps: int = 8, **changes) -> TrajectoryPlan:
    return TrajectoryPlan(**{"times": KD_TIMES, "steps": steps, "shift": 5.0, "sigma_max": 1600.0, **changes})


def made(builder: ODEPairBuilder, start: int, stop: int, *, batch: int = 2) -> torch.Tensor:
    return torch.stack([sample.latents for sample in builder.samples(start, stop, batch=batch, dtype=torch.float32)])


def test_states_converge_to_the_exact_path_to_first_order():
    """Unit noise at t = 1 moves as (1 - t) mu + A(t) noise and ends at mu + s noise
    (`LinearGaussian`).
    """
    world, noise = LinearGaussian(), numbered_noise((3, 2, 4, 4), range(4), seed=0)
    t = torch.tensor([0.0, *KD_TIMES], dtype=torch.float64).view(1, -1, 1, 1, 1, 1)
    exact = (1 - t) * world.mu + torch.sqrt((1 - t) ** 2 * world.s**2 + t**2) * noise[:, None]

    def error(steps: int) -> torch.Tensor:
        states = walk(lambda x, t: world.rf_velocity(x, per_frame(t, x)), noise, plan(steps))
        assert states.shape == (4, 5, 3, 2, 4, 4) and states.dtype == torch.float32
        return (states - exact).abs().amax((0, 2, 3, 4, 5))

    errors = torch.stack([error(steps) for steps in (32, 64, 128)])
    assert (errors[:, 1] == 0).all()  # the state at t = 1 is the noise
    ratios = errors[:-1, [0, 2, 3, 4]] / errors[1:, [0, 2, 3, 4]]
    assert ((ratios > 1.6) & (ratios < 2.5)).all(), ratios
    assert errors[-1, 1:].max() < 2e-3 and errors[-1, 0] < 0.06  # the grid is coarse at its end


def test_kept_times_are_points_of_the_samplers_grid():
    assert plan(4).grid() == (*KD_TIMES, 0.0)  # shift 5 of 1, 3/4, 1/2, 1/4
    # shift 3, equal to the sampler's but for rounding
    sixths = (1.0, *(round(3 * k / (6 + 2 * k), 15) for k in (5, 4, 3, 2, 1)))
    assert plan(6, times=sixths, shift=3.0).grid() == (*sixths, 0.0)
    grid = plan(6, times=(1.0, 0.5)).grid()
    # 1, .96, .91, .83, .71, .5, 0
    own = [5 * u / (1 + 4 * u) for u in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0)]
    assert grid == pytest.approx(own) and 0.5 in grid and grid[0] == 1
    late, own = plan(times=(0.55,)).grid(), shifted_grid(8, shift=5.0, sigma_max=1600.0)
    assert late == pytest.approx(sorted((0.55, *own), reverse=True)) and 0.55 in late


def test_a_bidirectional_trajectory_ends_where_the_sampler_does(bidirectional):
    """With no times of its own the walk is the checkpoint's sampler, guidance included."""
    first = shifted_grid(MANY_STEP.steps, shift=MANY_STEP.shift, sigma_max=MANY_STEP.sigma_max)[0]
    walked = TrajectoryPlan.of(bidirectional, times=(first,), seed=3)
    found = made(ODEPairBuilder(bidirectional, walked, prompts=PROMPTS), 1, 2)
    teacher = Guided(bidirectional.denoiser, bidirectional.negative, MANY_STEP.guidance)
    noise = generator(seed=3, step=1, dp_rank=0, purpose="ode_pairs")
    told = whole_latents(teacher, bidirectional.condition(PROMPTS[1:]), MANY_STEP, shape=(1, *LATENT_SHAPE), generator=noise)
    torch.testing.assert_close(found[:, 0], told, **EXACT)
    plain = made(ODEPairBuilder(bidirectional, replace(walked, guidance=1.0), prompts=PROMPTS), 1, 2)
    assert (plain[:, 0] - told).abs().max() > 0.01


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_blocks_of_a_causal_trajectory_are_those_walked_alone(causal, guidance):
    """Block i alone, streaming over a cache of the data before it, follows the same states."""
    walked, source = TrajectoryPlan.of(causal, guidance=guidance), data()
    batch, noise = source.fetch([0, 1]), numbered_noise(LATENT_SHAPE, range(2), seed=0)
    teacher = Guided(causal.denoiser, causal.negative, guidance)
    cond, blocks, structure = (
        Condition(batch.text),
        causal.recipe.blocks,
        {"grid": (2, 2), "pattern": causal.recipe.blocks, "num_frames": 6},
    )
    cache, states = teacher.new_cache(num_frames=6, grid=(2, 2)), []
    with torch.no_grad():
        for block, (start, stop) in enumerate(blocks.bounds(6)):
            layout, view = TokenLayout.cached_chunk(block, **structure), cache.readonly
            states.append(walk(lambda x, t, a=layout, v=view: teacher.velocity(x, t, cond, a, cache=v()), noise[:, :, start:stop], walked))
            clean = batch.latents[:, :, start:stop].double()
            teacher.velocity(clean, torch.zeros(2, 1, dtype=torch.float64), cond, layout, cache=cache.append())
    found = made(ODEPairBuilder(causal, walked, latents=source), 0, 2)
    torch.testing.assert_close(found, torch.cat(states, dim=3), **EXACT)


def test_causal_samples_carry_their_data(causal):
    source = data()
    found = list(ODEPairBuilder(causal, TrajectoryPlan.of(causal), latents=source).samples(2, 5, batch=2, dtype=torch.float32))
    told = source.fetch([2, 0, 1])  # more samples than videos: they come again, with other noise
    assert [sample.prompt for sample in found] == told.prompts
    assert torch.equal(torch.stack([sample.context for sample in found]), told.latents)
    assert torch.equal(torch.stack([sample.text for sample in found]), told.text)
    again = made(ODEPairBuilder(causal, TrajectoryPlan.of(causal), latents=source), 0, 1)[0]
    assert (found[1].latents[0] - again[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_samples_depend_on_their_number_alone(request, kind):
    model = request.getfixturevalue(kind)
    given = {"latents": data()} if kind == "causal" else {"prompts": PROMPTS}
    builder = ODEPairBuilder(model, TrajectoryPlan.of(model, seed=7), **given)
    together, singly, late = made(builder, 0, 5, batch=5), made(builder, 0, 5, batch=1), made(builder, 3, 5, batch=2)
    torch.testing.assert_close(singly, together, **EXACT)
    torch.testing.assert_close(late, together[3:], **EXACT)
    assert torch.equal(together[:, 1], numbered_noise(LATENT_SHAPE, range(5), seed=7))  # at t = 1
    assert len({row.sum().item() for row in together[:, 1]}) == 5
    other = ODEPairBuilder(model, TrajectoryPlan.of(model, seed=8), **given)
    assert (made(other, 0, 1)[:, 1] - together[:1, 1]).abs().max() > 1


@pytest.mark.parametrize("times", [(), (0.5, 0.75), (0.5, 0.5), (1.5, 0.5), (0.5, 0.0), (float("nan"),)])
def test_impossible_times(times):
    with pytest.raises(ConfigError, match=r"--times"):
        plan(times=times)


def test_inputs_that_do_not_fit_the_teacher(bidirectional, causal, tmp_path):
    for model, given, told in (
        (bidirectional, {"latents": data()}, "is bidirectional.*leave out --latents"),
        (bidirectional, {}, "need prompts"),
        (causal, {"prompts": PROMPTS}, r"is causal \(c3-3\).*--latents"),
        (causal, {"prompts": PROMPTS, "latents": data()}, "leave out --prompts"),
    ):
        with pytest.raises(ConfigError, match=told):
            ODEPairBuilder(model, TrajectoryPlan.of(model), **given)
    for name, recipe in (("student", STUDENT), ("rcm", FEW_STEP)):
        with pytest.raises(ConfigError, match="few-step student.*no ODE"):
            TrajectoryPlan.of(opened(tmp_path / name, recipe))
