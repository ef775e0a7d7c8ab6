"""The chunk loop on a tiny network in float64: streaming, context rules, prefixes and replay
against straightforward recomputation.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.layout import TokenLayout
from rcm.rollout.autoregressive import Canvas, ChunkLoop, rollout, time_tensor
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.relax_forcing import RelaxForcing
from rcm.rollout.noise import VideoNoise
from rcm.rollout.plan import ContextRule
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.steps import ConsistencyStep
from tests.support.tiny_nets import GRID, HEIGHT, PATTERNS, WIDTH, condition, tiny_config, tiny_net

MIDS = (0.8, 0.5)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(tiny_net(), Precision.preset("fp64"))


def run(denoiser, name, *, context=ContextRule(), in_place=False, mids=(MIDS, MIDS[1:]), commit_last=True):
    frames = PATTERNS[name]
    recipe = SamplingRecipe(
        "few_step", name, mids=mids, sigma_max=999.0, noisy_context=context.noisy, noisy_context_start_chunk=context.start_chunk
    )
    plans = recipe.plans(frames)
    shape = (2, 4, frames, HEIGHT, WIDTH)
    noise = VideoNoise.for_plans(plans, shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64, device="cpu")
    canvas = Canvas(GRID)
    cache = denoiser.new_cache(num_frames=frames, grid=GRID)
    with torch.no_grad():
        out = list(
            rollout(
                denoiser,
                condition(tiny_config()),
                plans,
                canvas=canvas,
                noise=noise,
                rule=ConsistencyStep(),
                cache=cache,
                in_place=in_place,
                commit_last=commit_last,
            )
        )
    return plans, noise, out, cache


def by_hand(denoiser, name, plans, noise, *, noisy_from=None):
    """The same video without any cache: every network call is a packed pass over [context so far;
    current chunk repeated into a full video].
    """
    pattern, frames = BlockPattern.parse(name), PATTERNS[name]
    shape = (2, 4, frames, HEIGHT, WIDTH)
    context, times = torch.zeros(shape, dtype=torch.float64), torch.zeros(2, frames, dtype=torch.float64)
    layout = TokenLayout.teacher_forcing(frames, grid=GRID, pattern=pattern)
    video = torch.zeros(shape, dtype=torch.float64)
    for plan in plans:
        cut = slice(plan.start, plan.stop)
        x = noise.start(cut) * plan.times[0]
        for step, (t, t_next) in enumerate(zip(plan.times[:-1], plan.times[1:], strict=True)):
            noisy = torch.zeros(shape, dtype=torch.float64)
            noisy[:, :, cut] = x
            packed = torch.cat([context, noisy], dim=2)
            stamp = torch.cat([times, torch.full((2, frames), t, dtype=torch.float64)], dim=1)
            with torch.no_grad():
                v = denoiser.velocity(packed, stamp, condition(tiny_config()), layout)[:, :, cut]
            x0 = x - t * v
            last_input, last_time = x, t
            x = (1 - t_next) * x0 + t_next * noise.step(step, cut) if t_next > 0 else x0
        video[:, :, cut] = x
        if noisy_from is not None and plan.block >= noisy_from:
            context[:, :, cut], times[:, cut] = last_input, last_time
        else:
            context[:, :, cut] = x
    return video


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("in_place", [False, True])
def test_streaming_equals_cache_free_recomputation(denoiser, name, in_place):
    plans, noise, out, cache = run(denoiser, name, in_place=in_place)
    torch.testing.assert_close(torch.cat([c.x0 for c in out], dim=2), by_hand(denoiser, name, plans, noise), rtol=0, atol=1e-10)
    assert cache.num_chunks == len(plans)


@pytest.mark.parametrize("name", ["c1-1", "c3-3"])
def test_noisy_context_equals_cache_free_recomputation(denoiser, name):
    plans, noise, out, _ = run(denoiser, name, context=ContextRule(True, 1), in_place=True)
    expected = by_hand(denoiser, name, plans, noise, noisy_from=1)
    torch.testing.assert_close(torch.cat([c.x0 for c in out], dim=2), expected, rtol=0, atol=1e-10)


def test_noisy_context_costs_no_extra_forward(denoiser, request):
    calls = []
    request.addfinalizer(denoiser.net.register_forward_pre_hook(lambda *_: calls.append(1)).remove)
    run(denoiser, "c1-1", mids=(MIDS,))
    clean = len(calls)
    calls.clear()
    run(denoiser, "c1-1", mids=(MIDS,), context=ContextRule(True, 0))
    assert (clean, len(calls)) == (4 * (3 + 1), 4 * 3)
    calls.clear()
    run(denoiser, "c1-1", mids=(MIDS,), commit_last=False)
    assert len(calls) == 4 * 4 - 1


def test_guidance_keeps_two_caches_in_step(denoiser):
    guided = Guided(denoiser, condition(tiny_config(), batch=1, seed=9), scale=2.0)
    _, _, with_negative, cache = run(guided, "c3-3")
    assert cache.negative.num_chunks == cache.cond.num_chunks == 2
    _, _, plain, _ = run(denoiser, "c3-3")
    assert (with_negative[1].x0 - plain[1].x0).abs().max() > 1e-3


def test_prefill_puts_given_frames_in_front(denoiser):
    """Generating block 1 after a given block 0 equals the same step of a rollout whose block 0 came
    out as that block.
    """
    plans, noise, out, _ = run(denoiser, "c3-3")
    cond, cache = condition(tiny_config()), denoiser.new_cache(num_frames=6, grid=GRID)
    loop = ChunkLoop(denoiser, canvas=Canvas(GRID), noise=noise, rule=ConsistencyStep(), cache=cache)
    loop.prefill(out[0].x0, plans[0], cond, t=0.0)
    with torch.no_grad():
        again = [loop.denoise(plan, cond) for plan in plans[1:]]
    torch.testing.assert_close(again[0].x0, out[1].x0, rtol=0, atol=1e-12)


def test_time_tensor_is_float64():
    assert time_tensor(0.3, 2, torch.device("cpu")).dtype == torch.float64


def test_a_misspelt_place_of_gradient_is_not_nowhere(denoiser):
    with pytest.raises(ConfigError, match="grad='last' is not one of 'none', 'last_step'"):
        ChunkLoop(denoiser, canvas=Canvas(GRID), noise=None, rule=ConsistencyStep(), cache=None, grad="last")


def test_policies_that_would_turn_or_choose_wrongly_are_refused(denoiser):
    """Keys were turned on by other angles than they had been turned by, and ranks chose apart."""

    def loop(model: Denoiser, policy: CachePolicy, keys: str = "post_rope") -> ChunkLoop:
        noise = VideoNoise((2, 4, 4, HEIGHT, WIDTH), num_draws=1, generator=torch.Generator(), dtype=torch.float64, device="cpu")
        cache = model.new_cache(num_frames=4, grid=GRID, keys=keys)
        return ChunkLoop(model, canvas=Canvas(GRID, policy), noise=noise, rule=ConsistencyStep(), cache=cache)

    stretched = Denoiser(tiny_net(), Precision.preset("fp64"))
    stretched.net.rope.stretch((2.0, 1.0, 1.0))
    shared = Denoiser(tiny_net(), Precision.preset("fp64"))
    shared.net.enter.group = SimpleNamespace(size=lambda: 2)
    for kind in (DeepForcing, RelaxForcing):
        with pytest.raises(ConfigError, match=rf"{kind.__name__}\(ntk_time=1\) would turn keys .* with ntk_time=2"):
            loop(stretched, kind())
        with pytest.raises(ConfigError, match=rf"{kind.__name__} chooses by all heads, and each of 2 ranks"):
            loop(shared, kind())
        loop(stretched, kind(ntk_time=2.0)), loop(shared, kind(reduce=lambda x: x)), loop(denoiser, kind())
        with pytest.raises(ConfigError, match=rf"{kind.__name__} needs a cache with keys='post_rope', got 'pre_rope'"):
            loop(denoiser, kind(), "pre_rope")
    with pytest.raises(ConfigError, match="InfinityRope needs a cache with keys='pre_rope', got 'post_rope'"):
        loop(denoiser, InfinityRope())
    loop(shared, CachePolicy()), loop(stretched, CachePolicy()), loop(denoiser, CachePolicy(), "pre_rope")
