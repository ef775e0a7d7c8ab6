import math

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.time import shift_time
from rcm.diffusion.time_sampling import ConsistencyGrid, LogNormal, TimeLawConfig, UniformShift
from tests.support.statistics import ks_bound, ks_distance

F64 = torch.float64
NUM = 20000
LAWS = [
    LogNormal(-0.8, 1.6),
    LogNormal(0.7, 1.6),
    LogNormal(0.0, 0.5),
    UniformShift(5.0),
    UniformShift(3.0),
    UniformShift(1.0),
    UniformShift(0.0),
]


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_cdf_describes_the_draws(law):
    draws = law.sample((NUM,), generator=_gen())
    assert draws.dtype == F64 and draws.shape == (NUM,)
    assert ((draws >= 0) & (draws <= 1)).all()
    assert ks_distance(law.cdf(draws)) < ks_bound(NUM)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_icdf_inverts_cdf_both_ways(law):
    t = law.icdf(torch.linspace(0.001, 0.999, 41, dtype=F64))
    torch.testing.assert_close(law.cdf(t), torch.linspace(0.001, 0.999, 41, dtype=F64), rtol=1e-10, atol=1e-12)
    t = torch.linspace(0.05, 0.95, 41, dtype=F64)
    torch.testing.assert_close(law.icdf(law.cdf(t)), t, rtol=1e-9, atol=1e-10)
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert torch.equal(law.cdf(ends), ends) and torch.equal(law.icdf(ends), ends)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_cdf_derivative_is_the_density(law):
    t = torch.linspace(0.02, 0.98, 33, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(law.cdf(t).sum(), t)
    t = t.detach()
    if isinstance(law, LogNormal):
        z = (torch.log(t / (1 - t)) - law.p_mean) / law.p_std
        density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / law.p_std / (t * (1 - t))
    else:
        s = law.shift if law.shift > 0 else 1.0
        density = s / (s - (s - 1) * t) ** 2
    torch.testing.assert_close(slope, density, rtol=1e-10, atol=1e-12)


def test_lognormal_is_normal_in_log_sigma():
    """Definition: log sigma ~ N(p_mean, p_std^2)."""
    t = LogNormal(-0.8, 1.6).sample((NUM,), generator=_gen(1))
    log_sigma = torch.log(t / (1 - t))
    assert abs(log_sigma.mean() + 0.8) < 4 * 1.6 / NUM**0.5
    assert abs(log_sigma.std() - 1.6) < 4 * 1.6 / (2 * NUM) ** 0.5


def test_uniform_shift_is_uniform_before_the_shift():
    """Definition: sigma = s u / (1 - u)."""
    t = UniformShift(5.0).sample((NUM,), generator=_gen(2))
    sigma = t / (1 - t) / 5.0
    assert ks_distance(sigma / (1 + sigma)) < ks_bound(NUM)
    assert t.median() > 0.8, "shift 5 moves the median to 5/6"


def test_same_generator_same_draws_any_shape():
    for law in LAWS:
        assert torch.equal(law.sample((2, 3), generator=_gen(4)).flatten(), law.sample((6,), generator=_gen(4)))


def test_bad_std():
    with pytest.raises(ConfigError, match="p_std"):
        LogNormal(0.0, 0.0)


def test_grid_formula():
    """t_k = shift(1 - (u + k/N)); N = 4, skip 2, shift 3, by hand."""
    u = torch.tensor([[0.0], [0.25], [0.5]], dtype=F64)
    times = ConsistencyGrid(4, 2, 3.0).times(u)
    by_hand = [[1.0, 0.9, 0.75], [0.9, 0.75, 0.5], [0.75, 0.5, 0.0]]
    torch.testing.assert_close(times, torch.tensor(by_hand, dtype=F64), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("skip", "shift"), [(1, 3.0), (1, 5.0), (4, 5.0), (48, 3.0)])
def test_grid_draws(skip, shift):
    times = ConsistencyGrid(48, skip, shift).sample(NUM, generator=_gen(5))
    assert times.shape == (NUM, skip + 1) and times.dtype == F64
    assert (times[:, :-1] > times[:, 1:]).all(), "from noise towards data"
    assert (times >= 0).all() and (times <= 1).all()
    phase = times / (shift - (shift - 1) * times)  # unshifted, 1 - u - k du
    torch.testing.assert_close(phase[:, :-1] - phase[:, 1:], torch.full((NUM, skip), 1 / 48, dtype=F64), rtol=1e-9, atol=1e-12)
    if skip < 48:
        assert ks_distance((1 - phase[:, 0]) / (1 - skip / 48)) < ks_bound(NUM), "u uniform on (0, 1 - skip/N)"


def test_grid_ends():
    """The last pair may end at exactly 0 and never below, whatever the rounding of 1 - (u +
    k/N).
    """
    for n in range(1, 60):
        grid = ConsistencyGrid(n, 1, 3.0)
        times = grid.times(torch.tensor([[0.0], [1 - 1 / n]], dtype=F64))
        assert times[0, 0] == 1.0
        assert 0 <= times[1, 1] < 1e-15 and times[1, 0] > 0
        torch.testing.assert_close(times[0, 1].item(), shift_time(1 - 1 / n, 3.0))


def test_bad_grids():
    for num_steps, skip in ((48, 0), (48, 49), (0, 1)):
        with pytest.raises(ConfigError, match="dcm_skipping_interval_steps"):
            ConsistencyGrid(num_steps, skip)
    with pytest.raises(ValueError, match=r"\[B, 1\]"):
        ConsistencyGrid().times(torch.zeros(3, dtype=F64))


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: LogNormal(bad, 1.6),
        lambda bad: LogNormal(-0.8, bad),
        lambda bad: UniformShift(bad),
        lambda bad: TimeLawConfig(p_mean=bad),
        lambda bad: TimeLawConfig(shift=bad),
        lambda bad: ConsistencyGrid(shift=bad),
        lambda bad: ConsistencyGrid(num_steps=bad),
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "5", None, True])
def test_laws_are_made_of_finite_numbers(make, bad):
    with pytest.raises(ConfigError, match="must be a (finite|whole) number"):
        make(bad)


@pytest.mark.parametrize(
    "make", [lambda s: UniformShift(s), lambda s: ConsistencyGrid(shift=s), lambda s: TimeLawConfig("uniform_shift", shift=s)]
)
def test_a_shift_leaves_times_to_tell_apart(make):
    for shift in (1e-300, 9e-4, 1001.0):
        with pytest.raises(ConfigError, match=r"shift=.* must be in 0.001 to 1000"):
            make(shift)
    make(1e-3), make(1000.0)
