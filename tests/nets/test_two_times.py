"""The second time of a network: without effect at the start, bit for bit; loaded from weights of
one time and no less; its tangent against functorch.
"""

from __future__ import annotations

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.denoiser import Denoiser
from rcm.nets.layout import TokenLayout
from rcm.nets.wan.config import PRESETS
from rcm.nets.wan.convert import detect_config, from_wan, load
from rcm.nets.wan.model import WanDiT
from rcm.nets.wan.two_times import SPAN, initial_span, with_second_time
from tests.support.tangent_oracle import central_difference, functorch_jvp, relative_error, with_eager_attention
from tests.support.tiny_nets import GRID, PATTERNS, condition, latents, pattern, tiny_config, tiny_net

TWO = {"two_times": True}
COND = condition(tiny_config())


def started() -> tuple[WanDiT, WanDiT]:
    """A network of one time, and one of two that was given its weights."""
    one = tiny_net(seed=5)
    two = tiny_net(seed=6, **TWO)
    load(two, one.state_dict())
    return one, two


def times(frames: int, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """t and an earlier s, RF, [2, frames]."""
    t, ratio = torch.rand(2, 2, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return t, t * ratio


@pytest.mark.parametrize("name", PATTERNS)
def test_a_started_network_is_the_one_of_one_time_bit_for_bit(name):
    """Packed, and block by block over a cache; at any second time."""
    frames, (one, two) = PATTERNS[name], (Denoiser(net, Precision.preset("fp64")) for net in started())
    x, (t, s) = latents(2 * frames), times(2 * frames)
    layout = TokenLayout.teacher_forcing(frames, grid=GRID, pattern=pattern(name))
    expected = one.velocity(x, t, COND, layout)
    assert torch.equal(two.velocity(x, t, COND, layout), expected)
    assert torch.equal(two.mean_velocity(x, t, s, COND, layout), expected)
    caches = [net.new_cache(num_frames=frames, grid=GRID) for net in (one, two)]
    first, rest = pattern(name).bounds(frames)[:2]
    with torch.no_grad():
        for net, cache in zip((one, two), caches, strict=True):
            head = slice(*first)
            layout = TokenLayout.over_cache(tuple(range(*first)), grid=GRID, context_tokens=0)
            net.enter_context(x[:, :, head], t[:, head], COND, layout, cache=cache.append())
        part, count = slice(*rest), first[1] * GRID[0] * GRID[1]
        layout = TokenLayout.over_cache(tuple(range(*rest)), grid=GRID, context_tokens=count)
        got = two.mean_velocity(x[:, :, part], t[:, part], s[:, part], COND, layout, cache=caches[1].readonly())
        assert torch.equal(got, one.velocity(x[:, :, part], t[:, part], COND, layout, cache=caches[0].readonly()))
        mine, theirs = two.time_rows(t[:, :1], s[:, :1]), one.time_rows(t[:, :1])
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_random_weights_of_the_rest_are_those_of_one_time():
    nets = [WanDiT(tiny_config(**kind)) for kind in ({}, TWO)]
    for net in nets:
        net.init_weights(torch.Generator().manual_seed(3))
    one, two = (net.state_dict() for net in nets)
    assert two.keys() - one.keys() == initial_span(tiny_config()).keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert two[f"{SPAN}.0.weight"].std() > 0.01 and not two[f"{SPAN}.2.weight"].any()


def test_a_trained_second_time_has_an_effect_and_none_means_no_distance():
    net = Denoiser(tiny_net(seed=6, **TWO), Precision.preset("fp64"))
    x, (t, s) = latents(3), times(3)
    layout = TokenLayout.bidirectional(3, grid=GRID)
    alone = net.velocity(x, t, COND, layout)
    assert torch.equal(net.mean_velocity(x, t, t, COND, layout), alone)
    assert (net.mean_velocity(x, t, s, COND, layout) - alone).abs().max() > 1e-2
    rows = net.time_rows(t[:, :1], s[:, :1]), net.time_rows(t[:, :1])
    assert not torch.equal(rows[0].embedding, rows[1].embedding)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_tangent_moves_both_times(name):
    """Over cached context, against functorch and differences of the packed pass: t moves, and with
    it t - s; the context stays.
    """
    forcing, frames = TeacherForcing(pattern(name)), PATTERNS[name]
    net = tiny_net(seed=6, **TWO)
    student, eager = (Denoiser(each, Precision.preset("fp64")) for each in (net, with_eager_attention(net)))
    x0, x_t, x_dot = latents(frames), latents(frames, seed=7), latents(frames, seed=8)
    t, s = (torch.full((2, 1), value, dtype=torch.float64) for value in (0.6, 0.25))
    context, moves = forcing.clean(x0), {"x_dot": x_dot, "t_dot": torch.ones_like(t)}
    u, u_dot = forcing.tangent(student, x_t, t, COND, context=context, s=s, **moves)
    torch.testing.assert_close(u, forcing.velocity(student, x_t, t, COND, context=context, s=s), rtol=0, atol=1e-10)
    zeros = torch.zeros(2, frames, dtype=torch.float64)
    layout = TokenLayout.teacher_forcing(frames, grid=GRID, pattern=forcing.pattern)
    ends = torch.cat([zeros, s.expand(2, frames)], 1)
    packed = (
        lambda x, time: eager.mean_velocity(x, time, ends, COND, layout),
        (torch.cat([x0, x_t], 2), torch.cat([zeros, t.expand(2, frames)], 1)),
        (torch.cat([torch.zeros_like(x0), x_dot], 2), torch.cat([zeros, torch.ones_like(zeros)], 1)),
    )
    torch.testing.assert_close((u, u_dot), functorch_jvp(*packed), rtol=0, atol=1e-9)
    assert relative_error(u_dot, central_difference(*packed, step=1e-5)) < 1e-6


def test_only_the_second_time_may_be_missing():
    one, two = tiny_net(seed=5).state_dict(), tiny_net(seed=6, **TWO)
    before = {key: value.clone() for key, value in two.state_dict().items()}
    lacking = {key: value for key, value in one.items() if key != "head.modulation"}
    with pytest.raises(CheckpointError, match=r"missing 1 key\(s\): head\.modulation"):
        load(two, lacking)
    part = {**one, f"{SPAN}.0.weight": before[f"{SPAN}.0.weight"]}
    with pytest.raises(CheckpointError, match=rf"part of the second time's embedding and lacks {SPAN}\.0\.bias"):
        load(two, part)
    assert all(torch.equal(before[key], value) for key, value in two.state_dict().items())
    with pytest.raises(CheckpointError, match=rf"a network of two times \({SPAN}\.\*\), .* and this network has one"):
        load(tiny_net(seed=5), before)
    config = tiny_config(**TWO)
    assert with_second_time(before, config) is before
    assert with_second_time(one, tiny_config()) is one


def test_the_second_time_is_found_in_the_tensors_and_absent_elsewhere():
    config = tiny_config(**TWO)
    assert detect_config(tiny_net(**TWO).state_dict(), head_dim=config.head_dim).two_times
    assert not detect_config(tiny_net().state_dict(), head_dim=config.head_dim).two_times
    with pytest.raises(CheckpointError, match=r"second time of a network, which diffusers has no name for; choose the rcm or wan"):
        from_wan(tiny_net(**TWO).state_dict(), form="diffusers")
    assert from_wan(tiny_net(**TWO).state_dict(), form="wan").keys() == tiny_net(**TWO).state_dict().keys()
    assert config.to_dict()["two_times"] is True
    assert not any("two_times" in known.to_dict() for known in PRESETS.values())


def test_a_network_of_one_time_knows_no_mean_velocity():
    net, layout = Denoiser(tiny_net(), Precision.preset("fp64")), TokenLayout.bidirectional(3, grid=GRID)
    t, s = times(3)
    with pytest.raises(ConfigError, match="one time.*training_type=tf_meanflow"):
        net.mean_velocity(latents(3), t, s, COND, layout)
    with pytest.raises(ValueError, match="net.two_times=True"):
        net.net(latents(3), 1000 * t, COND, layout, span=1000 * (t - s))
    with pytest.raises(ValueError, match=r"span must have the shape of timestep, \(2, 3\), got \(2, 1\)"):
        tiny_net(**TWO)(latents(3), 1000 * t, COND, layout, span=t[:, :1])
