"""UniPC and Euler walk like an independent library's schedulers on the same velocity field and the
same grid.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from rcm.samplers.bidirectional import SingleStep
from rcm.samplers.schedule import shifted_grid, trig_grid
from rcm.samplers.steps import EulerStep
from rcm.samplers.unipc import UniPC


def field(x: torch.Tensor, t: float) -> torch.Tensor:
    """A nonlinear velocity that depends on place and time."""
    return torch.sin(1.3 * x + 2 * t) + 0.4 * x * (1 - t) - 0.3 * x.flip(-1)


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def walk(scheduler, grid: tuple[float, ...]) -> torch.Tensor:
    scheduler.set_timesteps(sigmas=np.array(grid[:-1]))
    scheduler.set_begin_index(0)
    scheduler.sigmas = torch.tensor(grid, dtype=torch.float64)
    x = noise()
    for t, timestep in zip(grid[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(field(x, t), timestep, x).prev_sample
    return x


GRIDS = {
    "50 steps, shift 5": shifted_grid(50, shift=5.0, sigma_max=5000),
    "9 steps, shift 3": shifted_grid(9, shift=3.0, sigma_max=5000),
    "3 steps": shifted_grid(3, shift=1.0, sigma_max=80),
    "2 steps": shifted_grid(2, shift=8.0, sigma_max=200),
    "1 step": shifted_grid(1, shift=5.0, sigma_max=5000),
    "uneven": trig_grid(4, sigma_max=80),
}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", GRIDS)
def test_unipc(name, order):
    peer = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_type="bh2", solver_order=order)
    expected = walk(peer, GRIDS[name])
    got = UniPC(GRIDS[name], order=order).sample(field, noise())
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", GRIDS)
def test_euler(name):
    expected = walk(FlowMatchEulerDiscreteScheduler(), GRIDS[name])
    got = SingleStep(GRIDS[name], EulerStep()).sample(field, noise())
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
