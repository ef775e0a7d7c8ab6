import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.time_sampling import LogNormal, UniformShift, block_times
from tests.support.statistics import ks_bound, ks_distance

NUM = 12000
LAWS = [LogNormal(-0.8, 1.6), UniformShift(5.0)]


def _times(law, strategy, *, name="c1-1", frames=5, batch=NUM, seed=0):
    return block_times(
        law, strategy=strategy, batch=batch, pattern=BlockPattern.parse(name), num_frames=frames,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["random", "same", "fopp"])
@pytest.mark.parametrize(("name", "frames"), [("c1-1", 4), ("c3-3", 9), ("c1-4", 9), ("c2-3", 8)])
def test_constant_inside_blocks(strategy, name, frames):
    times = _times(LAWS[0], strategy, name=name, frames=frames, batch=6)
    assert times.shape == (6, frames) and times.dtype == torch.float64
    assert ((times >= 0) & (times <= 1)).all()
    pattern = BlockPattern.parse(name)
    for start, stop in pattern.bounds(frames):
        assert (times[:, start:stop] == times[:, start : start + 1]).all()
    if strategy != "same":
        starts = [start for start, _ in pattern.bounds(frames)]
        assert (times[:, starts].diff(dim=1) != 0).all()


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_same_is_one_draw_of_the_law(law):
    times = _times(law, "same")
    assert (times == times[:, :1]).all()
    assert ks_distance(law.cdf(times[:, 0])) < ks_bound(NUM)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_random_blocks_are_independent_draws_of_the_law(law):
    u = law.cdf(_times(law, "random"))
    for block in range(5):
        assert ks_distance(u[:, block]) < ks_bound(NUM)
    correlation = torch.corrcoef(u.T) - torch.eye(5, dtype=u.dtype)
    assert correlation.abs().max() < 4.5 / NUM**0.5


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_fopp_is_monotone(law):
    assert (_times(law, "fopp", frames=21, batch=500).diff(dim=1) >= 0).all()


def _oracle_fopp(law, num_blocks, num, seed):
    """Straight from the words: anchor, then really sorted uniforms on either side. Returns u =
    cdf(time), [num, num_blocks].
    """
    g = torch.Generator().manual_seed(seed)
    u, anchors = torch.empty(num, num_blocks, dtype=torch.float64), torch.randint(num_blocks, (num,), generator=g)
    for row, a in enumerate(anchors.tolist()):
        u_a = torch.rand((), generator=g, dtype=torch.float64)
        before = torch.rand(a, generator=g, dtype=torch.float64).sort().values * u_a
        after = u_a + (1 - u_a) * torch.rand(num_blocks - 1 - a, generator=g, dtype=torch.float64).sort().values
        u[row] = torch.cat([before, u_a[None], after])
    return u


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_fopp_has_the_law_of_sorted_uniforms_around_an_anchor(law):
    """Every block's marginal, and the means of products of neighbours, against a slow oracle that
    sorts.
    """
    num = 6000
    u = law.cdf(_times(law, "fopp", frames=4, batch=num))
    oracle = _oracle_fopp(law, 4, num, seed=9)
    for block in range(4):
        pooled = oracle[:, block].sort().values
        rank = torch.searchsorted(pooled, u[:, block].contiguous()).double() / num
        assert ks_distance(rank) < 1.5 * ks_bound(num)
    assert ((u.T @ u - oracle.T @ oracle) / num).abs().max() < 0.02
    # Also absolutely: P(anchor = k) = 1/4, and given it block 0 has u = u_a * (smallest of k
    # uniforms) with mean 1/2 * 1/(k+1).
    expected = sum(0.5 / (k + 1) for k in range(4)) / 4
    assert abs(u[:, 0].mean() - expected) < 0.015


def test_fopp_anchor_has_the_law():
    """With two blocks the anchor is either: half the pooled mass of (first | anchor 0, second |
    anchor 1) is the law itself.

    For two blocks: anchor 0 gives (U, U + (1-U) V), anchor 1 gives (U V, U): the pooled cdf values
    average to 1/2, and block 0 has density (1 - ln u) / 2, whose cdf is u - u ln(u) / 2.
    """
    law = LAWS[0]
    u = law.cdf(_times(law, "fopp", frames=2, seed=3))
    first = u[:, 0]
    assert ks_distance(first - first * first.log() / 2) < ks_bound(NUM)
    second = 1 - u[:, 1]
    assert ks_distance(1 - (second - second * second.log() / 2)) < ks_bound(NUM)


def test_fopp_with_one_block_is_the_law():
    law = LAWS[1]
    times = _times(law, "fopp", name="c3-3", frames=3)
    assert ks_distance(law.cdf(times[:, 0])) < ks_bound(NUM)


def test_seeded():
    for strategy in ("random", "same", "fopp"):
        assert torch.equal(_times(LAWS[0], strategy, batch=4), _times(LAWS[0], strategy, batch=4))
        assert not torch.equal(_times(LAWS[0], strategy, batch=4), _times(LAWS[0], strategy, batch=4, seed=1))


def test_errors():
    with pytest.raises(ConfigError, match="'sorted'.*random, same, fopp"):
        _times(LAWS[0], "sorted", batch=1)
    with pytest.raises(ConfigError, match="num_frames=5"):
        _times(LAWS[0], "same", name="c3-3", batch=1)
