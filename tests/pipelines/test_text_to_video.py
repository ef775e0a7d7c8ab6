"""Whole-video recipes: their grids are those of the released scripts, their solvers what the names
say.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.rollout.autoregressive import time_tensor
from rcm.samplers.bidirectional import SingleStep
from rcm.samplers.steps import ConsistencyStep, EulerStep
from rcm.samplers.unipc import UniPC


def test_many_step_grid_is_the_released_one():
    """sigma 5000, shift 5, 50 steps: even before the shift, and not truncated to whole timesteps
    (docs/reference/sampling.md#many-steps).
    """
    s = 5000 / 5001
    even = np.linspace(s / (5 - 4 * s), 0, 51)
    times = WholeVideoRecipe("ode", sigma_max=5000, steps=50, shift=5.0).times()
    np.testing.assert_allclose(times, 5 * even / (1 + 4 * even), atol=1e-14)
    assert times[-1] == 0.0 and 1000 * times[0] == pytest.approx(999.80004, abs=1e-5)
    assert 1000 * times[1] == pytest.approx(995.73, abs=0.01) and (1000 * times[1]) % 1 > 0.1


@pytest.mark.parametrize(("sigma_max", "expected"), [(80, 988), (200, 996), (120, 992)])
def test_networks_are_told_bf16_timesteps(sigma_max, expected):
    """987.654 becomes 988 and so on: what the checkpoints were trained with
    (docs/reference/wan.md#precision).
    """
    seen = []

    class Net(nn.Module):
        def forward(self, x, timestep, cond, layout, cache=None):
            seen.append(timestep)
            return x.float()

    denoiser = Denoiser(Net(), Precision.preset("bf16"))
    x, layout = torch.zeros(1, 16, 1, 2, 2), TokenLayout.bidirectional(1, grid=(1, 1))
    for t in WholeVideoRecipe("rcm_few_step", sigma_max=sigma_max, steps=4).times()[:-1]:
        denoiser.velocity(x, time_tensor(t, 1, x.device), Condition(torch.zeros(1, 1, 1)), layout)
    assert [timestep.item() for timestep in seen] == [expected, 932, 852, 608]
    assert {timestep.dtype for timestep in seen} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "solver", "expected"),
    [
        ("ode", None, EulerStep),
        ("ode", "euler", EulerStep),
        ("ode", "unipc", None),
        ("rcm_few_step", None, ConsistencyStep),
        ("rcm_few_step", "consistency", ConsistencyStep),
        ("rcm_few_step", "euler", EulerStep),
    ],
)
def test_solvers(kind, solver, expected):
    recipe = WholeVideoRecipe(kind, sigma_max=80, steps=3, solver=solver)
    sampler = recipe.sampler()
    assert sampler.times == recipe.times()
    if expected is None:
        assert isinstance(sampler, UniPC) and sampler.order == 2
    else:
        assert isinstance(sampler, SingleStep) and isinstance(sampler.rule, expected)
        assert sampler.scale_first is (kind == "rcm_few_step")


@pytest.mark.parametrize(("kind", "solver"), [("ode", "consistency"), ("rcm_few_step", "unipc"), ("ode", "heun")])
def test_pairs_that_do_not_fit(kind, solver):
    with pytest.raises(ConfigError, match=f"solver '{solver}' does not walk the grid of '{kind}'"):
        WholeVideoRecipe(kind, sigma_max=80, steps=3, solver=solver)


def test_descriptions_may_name_the_solver():
    told = {"kind": "ode", "sigma_max": 5000.0, "steps": 4, "solver": "unipc"}
    assert WholeVideoRecipe.from_dict(told) == WholeVideoRecipe("ode", sigma_max=5000.0, steps=4, solver="unipc")
    with pytest.raises(ConfigError, match="unknown keys"):
        WholeVideoRecipe.from_dict({**told, "order": 3})


def test_few_steps_start_above_the_second():
    with pytest.raises(ConfigError, match="sigma_max=10 must be above 14.1"):
        WholeVideoRecipe("rcm_few_step", sigma_max=10, steps=2)
    assert WholeVideoRecipe("rcm_few_step", sigma_max=10, steps=1).times()[0] == pytest.approx(10 / 11)
