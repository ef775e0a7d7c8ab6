"""Sampling of a student of two times: jumps without renoising, block by block, as its checkpoint
describes them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.rollout.autoregressive import Canvas, rollout
from rcm.rollout.noise import VideoNoise
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.steps import FlowMapStep
from rcm.train.description_rules import check_description
from tests.support.linear_gaussian import LinearGaussian
from tests.support.tiny_nets import GRID, HEIGHT, PATTERNS, WIDTH, condition, tiny_config, tiny_net

WORLD = LinearGaussian()
COND = condition(tiny_config())
MIDS = ((0.8, 0.5), (0.5,))


class ExactMap(Denoiser):
    """A network whose mean velocity is that of the linear-Gaussian world."""

    def mean_velocity(self, x, t, s, cond, layout, *, cache=None):
        return WORLD.rf_mean_velocity(x, t.view(-1, 1, 1, 1, 1), s.view(-1, 1, 1, 1, 1))


def run(denoiser: Denoiser, recipe: SamplingRecipe) -> tuple[VideoNoise, torch.Tensor, tuple]:
    frames = PATTERNS[recipe.pattern]
    plans, shape = recipe.plans(frames), (2, 4, frames, HEIGHT, WIDTH)
    drawn = {"generator": torch.Generator().manual_seed(5), "dtype": torch.float64, "device": "cpu"}
    noise = VideoNoise.for_plans(plans, shape, renoises=recipe.rule.needs_noise, **drawn)
    made = {"canvas": Canvas(GRID), "noise": noise, "rule": recipe.rule}
    with torch.no_grad():
        cache = denoiser.new_cache(num_frames=frames, grid=GRID)
        out = [chunk.x0 for chunk in rollout(denoiser, COND, plans, cache=cache, **made)]
    return noise, torch.cat(out, dim=2), plans


@pytest.mark.parametrize("mids", [((),), MIDS, ((0.9, 0.7, 0.4),)])
def test_an_exact_map_ends_where_the_ode_does_in_any_number_of_steps(mids):
    recipe = SamplingRecipe("flow_map", "c3-3", mids=mids)
    noise, video, plans = run(ExactMap(tiny_net(two_times=True), Precision.preset("fp64")), recipe)
    first = torch.tensor(plans[0].times[0], dtype=torch.float64)
    start = noise.start(slice(0, video.shape[2])) * first
    torch.testing.assert_close(video, WORLD.rf_flow_map(start, first, torch.zeros_like(first)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("noisy", [False, True])
def test_streaming_equals_packed_recomputation(name, noisy):
    """Context at its own time (s = t), chunks at t and the next time."""
    frames, recipe = PATTERNS[name], SamplingRecipe("flow_map", name, mids=MIDS, noisy_context=noisy)
    denoiser = Denoiser(tiny_net(seed=6, two_times=True), Precision.preset("fp64"))
    noise, video, plans = run(denoiser, recipe)
    layout = TokenLayout.teacher_forcing(frames, grid=GRID, pattern=recipe.blocks)
    context, times = torch.zeros_like(video), torch.zeros(2, frames, dtype=torch.float64)
    for plan in plans:
        cut = slice(plan.start, plan.stop)
        x = noise.start(cut) * plan.times[0]
        for t, s in zip(plan.times[:-1], plan.times[1:], strict=True):
            chunk = torch.zeros_like(video)
            chunk[:, :, cut], left = x, (x, t)
            at, end = (torch.cat([times, torch.full_like(times, value)], dim=1) for value in (t, s))
            with torch.no_grad():
                u = denoiser.mean_velocity(torch.cat([context, chunk], dim=2), at, end, COND, layout)[:, :, cut]
            x = x - (t - s) * u
        torch.testing.assert_close(video[:, :, cut], x, rtol=0, atol=1e-10)
        context[:, :, cut], times[:, cut] = left if noisy else (x, 0.0)


def test_the_recipe_keeps_its_kind_and_is_read_back():
    recipe = SamplingRecipe("flow_map", "c3-3")
    assert isinstance(recipe.rule, FlowMapStep) and not recipe.rule.needs_noise
    assert recipe.with_steps(2).kind == "flow_map" and recipe.with_steps(2).plan(1).num_steps == 2
    assert SamplingRecipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ConfigError, match=r"guidance=3 \(--guidance_scale\) would combine two passes; .* leave it at 1"):
        replace(recipe, guidance=3.0)
    with pytest.raises(ConfigError, match="kind: the checkpoint was trained for 'flow_map'"):
        SamplingRecipe("few_step", "c3-3").require_compatible(recipe)
    with pytest.raises(ConfigError, match="'flow-map' is not one of 'few_step', 'flow_map', 'ode'"):
        SamplingRecipe("flow-map", "c3-3")


@pytest.mark.parametrize("two_times", [True, False])
def test_a_description_of_jumps_needs_a_network_of_two_times(two_times):
    network = tiny_config(two_times=two_times).to_dict() | {"patch": [1, 2, 2]}
    recipe = SamplingRecipe("flow_map", "c3-3").to_dict()
    recipe["mids"] = [list(entry) for entry in recipe["mids"]]
    described = {"stage": "tf_meanflow", "network": network, "pattern": "c3-3", "extra": {"recipe": recipe}}
    if two_times:
        check_description(described, source="rcm.json")
    else:
        with pytest.raises(CheckpointError, match=r"recipe\.kind is 'flow_map', but network\.two_times is not true"):
            check_description(described, source="rcm.json")


def test_a_network_of_one_time_is_refused():
    with pytest.raises(ConfigError, match="this model has one time"):
        run(Denoiser(tiny_net(), Precision.preset("fp64")), SamplingRecipe("flow_map", "c3-3"))
