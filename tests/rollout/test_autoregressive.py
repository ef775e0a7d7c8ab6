"""The chunk loop of training on a tiny network in float64: rollouts, context rules and prefixes
against recomputation; what is refused.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.denoiser import Denoiser, Guided
from rcm.rollout.autoregressive import Canvas, ChunkLoop, rollout
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.relax_forcing import RelaxForcing
from rcm.rollout.noise import VideoNoise
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.steps import ConsistencyStep
from tests.support.stream_oracle import Rule, stream
from tests.support.tiny_nets import GRID, HEIGHT, PATTERNS, WIDTH, condition, tiny_config, tiny_net

MIDS = (0.8, 0.5)


def run(denoiser, name, *, mids=(MIDS, MIDS[1:]), commit_last=True, **context):
    frames, recipe = PATTERNS[name], SamplingRecipe("few_step", name, mids=mids, sigma_max=999.0, **context)
    plans, drawn = recipe.plans(frames), {"generator": torch.Generator().manual_seed(5), "dtype": torch.float64, "device": "cpu"}
    noise = VideoNoise.for_plans(plans, (2, 4, frames, HEIGHT, WIDTH), **drawn)
    cache = denoiser.new_cache(num_frames=frames, grid=GRID)
    made = {"canvas": Canvas(GRID), "noise": noise, "rule": ConsistencyStep(), "cache": cache, "commit_last": commit_last}
    with torch.no_grad():
        return plans, noise, list(rollout(denoiser, condition(tiny_config()), plans, **made)), cache


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("context", [{}, {"noisy_context": True, "noisy_context_start_chunk": 1}], ids=["clean", "noisy"])
def test_a_rollout_equals_recomputation_token_by_token(denoiser, name, context):
    """As training has it, whose passes leave nothing in the cache beside what they append; streams:
    test_eviction.py.
    """
    plans, noise, out, cache = run(denoiser, name, **context)
    recipe = SamplingRecipe("few_step", name, mids=(MIDS, MIDS[1:]), sigma_max=999.0, **context)
    made = {"blocks": len(plans), "noise": noise, "latent": (4, HEIGHT, WIDTH), "batch": 2}
    expected = stream(denoiser, condition(tiny_config()), recipe, Rule(), **made)
    torch.testing.assert_close(torch.cat([c.x0 for c in out], dim=2), expected, rtol=0, atol=1e-10)
    assert cache.num_chunks == len(plans)


def test_noisy_context_costs_no_extra_forward(denoiser, request):
    calls = []
    request.addfinalizer(denoiser.net.register_forward_pre_hook(lambda *_: calls.append(1)).remove)
    run(denoiser, "c1-1", mids=(MIDS,))
    clean = len(calls)
    calls.clear()
    run(denoiser, "c1-1", mids=(MIDS,), noisy_context=True)
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
