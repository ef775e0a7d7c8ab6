"""Time grids against the numbers of docs/reference/wan.md#precision, Causal_rCM.md section 9 and
closed forms.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.samplers.bidirectional import SingleStep
from rcm.samplers.schedule import CAUSAL_MID_TIMES, few_step_grid, initial_time, parse_schedules, parse_times, shifted_grid, trig_grid
from rcm.samplers.steps import ConsistencyStep, EulerStep
from rcm.samplers.unipc import UniPC


@pytest.mark.parametrize(("sigma_max", "expected"), [(80, 987.654), (200, 995.02), (120, 991.74)])
def test_trig_grid_starts_at_the_published_timesteps(sigma_max, expected):
    grid = trig_grid(4, sigma_max=sigma_max)
    assert 1000 * grid[0] == pytest.approx(expected, abs=0.006)
    assert [1000 * t for t in grid[1:4]] == pytest.approx([933.78, 852.90, 608.98], abs=0.006)
    assert grid[4] == 0.0


def test_shifted_grid_is_uniform_after_unshifting():
    grid = shifted_grid(50, shift=3.0, sigma_max=1600.0)
    assert grid[0] == pytest.approx(1600 / 1601, abs=1e-14) and grid[-1] == 0.0 and len(grid) == 51
    unshifted = [t / (3 - 2 * t) for t in grid]
    gaps = [a - b for a, b in pairwise(unshifted)]
    assert max(gaps) - min(gaps) < 1e-12


def test_causal_mid_times_are_shift_five_of_quarters():
    shifted = [5 * u / (1 + 4 * u) for u in (0.75, 0.5, 0.25)]
    assert pytest.approx(shifted, abs=1e-15) == CAUSAL_MID_TIMES


def test_identity_shift():
    assert shifted_grid(4, shift=1.0, sigma_max=1e12) == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-11)
    assert shifted_grid(4, shift=-1.0, sigma_max=7.0) == shifted_grid(4, shift=1.0, sigma_max=7.0)


@pytest.mark.parametrize("text", ["15/16 5/6 5/8", "15/16,5/6,5/8", ["15/16", "5/6", "5/8"], ["0.9375,5/6", "0.625"]])
def test_times_are_read_in_every_documented_spelling(text):
    assert parse_times(text) == pytest.approx((15 / 16, 5 / 6, 5 / 8))


def test_schedules_keep_empty_entries():
    assert parse_schedules("15/16,5/6,5/8;") == (pytest.approx((15 / 16, 5 / 6, 5 / 8)), ())
    assert parse_schedules("") == ()


@pytest.mark.parametrize("bad", ["a", "1/0", "0.5;0.3", "1e400", "nan", "1/2 inf"])
def test_unreadable_times_name_the_text(bad):
    with pytest.raises(ConfigError, match="cannot read times"):
        parse_times(bad)


@pytest.mark.parametrize(("mids", "first"), [((0.5, 0.7), 1.0), ((0.5, 0.5), 1.0), ((1.0,), 1.0), ((0.0,), 1.0), ((), 1.5)])
def test_grids_must_decrease(mids, first):
    with pytest.raises(ConfigError):
        few_step_grid(mids, first=first)


def test_other_bad_numbers():
    with pytest.raises(ConfigError, match="sigma_max"):
        initial_time(0.0)
    with pytest.raises(ConfigError, match="num_steps"):
        trig_grid(5, sigma_max=80)
    with pytest.raises(ConfigError, match="num_steps"):
        shifted_grid(0, shift=1.0, sigma_max=80)
    for sigma in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"sigma_max={sigma}"):
            initial_time(sigma)
    with pytest.raises(ConfigError, match="sigma_max=nan"):
        trig_grid(1, sigma_max=math.nan)
    with pytest.raises(ConfigError, match="shift=nan"):
        shifted_grid(4, shift=math.nan, sigma_max=80)


def test_euler_integrates_a_linear_field_to_first_order():
    """dx/dt = x / t has x(t) proportional to t; Euler on N steps has error O(1/N) against the exact
    end of a smooth field dx/dt = x.
    """
    x1 = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for n in (100, 200):
        grid = tuple(1 - k / n for k in range(n + 1))
        end = SingleStep(grid, EulerStep()).sample(lambda x, t: x, x1)
        errors.append(abs(end.item() - math.exp(-1)))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_consistency_step_jumps_and_renoises():
    x = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    v, n = torch.randn_like(x), torch.randn_like(x)
    torch.testing.assert_close(ConsistencyStep()(x, v, t=0.8, t_next=0.3, noise=n), 0.7 * (x - 0.8 * v) + 0.3 * n)
    torch.testing.assert_close(ConsistencyStep()(x, v, t=0.8, t_next=0.0, noise=None), x - 0.8 * v)
    with pytest.raises(ValueError, match="noise"):
        ConsistencyStep()(x, v, t=0.8, t_next=0.3, noise=None)


def test_a_velocity_of_another_shape_is_refused():
    noise = torch.zeros(1, 3, 2, 2, 2, dtype=torch.float64)
    for sampler in (SingleStep((0.9, 0.5, 0.0), EulerStep()), UniPC((0.9, 0.5, 0.0))):
        with pytest.raises(ValueError, match=r"x \(1, 3, 2, 2, 2\), velocity \(1, 1, 2, 2, 2\)"):
            sampler.sample(lambda x, t: x[:, :1], noise)


@pytest.mark.parametrize("times", [(), (0.0,), (0.9, 0.5), (0.5, 0.9, 0.0), (0.5, 0.5, 0.0), (math.nan, 0.0), [0.9, 0.0]])
def test_times_fall_to_zero(times):
    with pytest.raises(ConfigError, match="times.* must"):
        SingleStep(times, EulerStep())


def test_unipc_is_made_of_finite_numbers():
    for wrong in ({"times": (0.9, math.nan, 0.0)}, {"times": (0.9, 0.0), "order": True}, {"times": (0.9, 0.0), "order": 1.5}):
        with pytest.raises(ConfigError, match="must be a"):
            UniPC(**wrong)
