"""Every policy in all its forms, as whole streams, against recomputation token by token; with every
other option of a stream: tests/pipelines/test_stream_pairs.py.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.nets.denoiser import Denoiser
from rcm.pipelines.session import Session, StreamSpec
from rcm.rollout.eviction.base import CachePolicy
from rcm.rollout.eviction.deep_forcing import DeepForcing
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.mem_rope import MemRope
from rcm.rollout.eviction.relax_forcing import RelaxForcing
from rcm.rollout.eviction.relax_forcing_paper import RelaxForcingPaper
from rcm.rollout.eviction.rolling_sink import RollingSink
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.noise import ChunkNoise
from rcm.rollout.recipe import SamplingRecipe
from tests.support import policy_rules as rules
from tests.support.stream_oracle import Rule, stream
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net
from tests.support.toy_extensions import Thinning

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.6,), (0.5,)))
LATENT = (4, HEIGHT, WIDTH)
BLOCKS = 9

POLICIES = {
    "everything": (CachePolicy(), Rule()),
    "sliding": (SlidingWindow(4), rules.Window(3)),
    "sliding+sink": (SlidingWindow(3, 1), rules.Window(3, 1)),
    "rolling": (RollingSink(3, 2, 1), rules.Rolling(3, 2, 1)),
    "rolling 4": (RollingSink(4, 2, 2), rules.Rolling(4, 2, 2)),
    "infinity": (InfinityRope(3, 1, 8), rules.Infinity(3, 1, 8)),
    "infinity clamped": (InfinityRope(4, 0, 3), rules.Infinity(4, 0, 3)),
    "infinity flush": (InfinityRope(3, 1, 8, flush_interval=4), rules.Infinity(3, 1, 8, interval=4)),
    "infinity cut": (InfinityRope(3, 1, 8, cut_delta=5, cuts=frozenset({4, 7})), rules.Infinity(3, 1, 8, delta=5, cuts=(4, 7))),
    "mem": (MemRope(2, 2, 0.3, 0.6), rules.Memory(2, 2, 0.3, 0.6)),
    "mem no sink": (MemRope(0, 1, 0.3, 0.6), rules.Memory(0, 1, 0.3, 0.6)),
    "mem positions": (MemRope(1, 2, 0.3, 0.6, per_position=True), rules.Memory(1, 2, 0.3, 0.6, per_position=True)),
    "deep": (DeepForcing(2, 6, 2), rules.Deep(2, 6, 2)),
    "deep last layer": (DeepForcing(1, 5, 1, observation_layers=1), rules.Deep(1, 5, 1, layers=1)),
    "deep without history": (DeepForcing(2, 4, 2), rules.Deep(2, 4, 2)),
    "relax": (RelaxForcing(1, 5, 2, 0.5), rules.Relax(1, 5, 2, 0.5)),
    "relax by contrast": (RelaxForcing(0, 4, 1, 0.1), rules.Relax(0, 4, 1, 0.1)),
    "relax paper": (RelaxForcingPaper(1, 1, 1, 5, 0.5, 12), rules.Roles(1, 1, 1, 5, 0.5, 12)),
    "toy": (Thinning(3), rules.Thinned(3)),
}
ROLES = {"relax paper": (RelaxForcingPaper(2, 2, 1, 6, 0.5, 24), rules.Roles(2, 2, 1, 6, 0.5, 24))}


RECACHED = [name for name in POLICIES if name != "toy"]


def check(model, policy, rule, recipe=RECIPE, *, blocks=BLOCKS, batch=2, ntk=1.0) -> None:
    """Run a session, then the oracle on the same noise, and compare."""
    cond = condition(tiny_config(), batch=batch)
    frames = None if policy.capacity_frames(recipe.blocks) else recipe.blocks.frames_before(blocks + 1)
    session = Session(model, None, cond, StreamSpec(recipe, LATENT, batch=batch, num_frames=frames, policy=policy))
    got = torch.cat([chunk.latents for chunk in itertools.islice(session, blocks)], dim=2)
    noise = ChunkNoise((batch, *LATENT), seed=0, dtype=torch.float64, device="cpu")
    wanted = stream(model, cond, recipe, rule, blocks=blocks, noise=noise, latent=LATENT, batch=batch, ntk=ntk)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=3e-6 * (1 + float(wanted.abs().max())))


def fresh(name: str, table=POLICIES):
    """Policy and a rule without memory of another test."""
    policy, rule = table[name]
    return policy, copy.deepcopy(rule)


@pytest.mark.parametrize("pattern", ["c1-1", "c3-2"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_stream_equals_recomputation_token_by_token(denoiser, name, pattern):
    policy, rule = fresh(name, ROLES if name == "relax paper" and pattern != "c1-1" else POLICIES)
    check(denoiser, policy, rule, replace(RECIPE, pattern=pattern))


@pytest.mark.parametrize("name", ["sliding", "infinity", "deep", "relax"])
def test_slower_turning_time(name):
    """An NTK ratio reaches the tables and the keys that a policy turns on."""
    net = tiny_net()
    net.rope.stretch((1.7, 1.0, 1.0))
    policy, rule = fresh(name)
    policy = replace(policy, ntk_time=1.7) if name in ("deep", "relax") else policy
    check(Denoiser(net, Precision.preset("fp64")).eval_params(), policy, rule, blocks=8, ntk=1.7)


@pytest.mark.parametrize("keep_from", [RECIPE, replace(RECIPE, noisy_context=True)], ids=["clean", "noisy"])
@pytest.mark.parametrize("name", RECACHED)
@torch.no_grad()
def test_after_a_recache_a_policy_is_as_if_the_window_had_been_made_under_the_new_prompt(denoiser, name, keep_from):
    """What it remembers of keys and queries, and every later chunk, beyond the budget: equal to a
    stream whose first chunks were entered under the new prompt, those of the sinks under the old
    one.
    """
    old, new, blocks = condition(tiny_config()), condition(tiny_config(), seed=5), 3
    spec = StreamSpec(keep_from, LATENT, batch=2, num_frames=12, policy=fresh(name)[0])
    sessions = [Session(denoiser, None, old, spec) for _ in range(2)]
    session, expected = sessions
    for _ in range(blocks):
        session.step()
    session.settle()
    kept = session.loop.canvas.policy.protected(session.loop.cache.branches)
    for block, (chunk, (x, t)) in enumerate(session._steering._contexts.items()):
        expected.loop.prefill(x, keep_from.plan(block), old if chunk in kept else new, t=t)
        expected._steering._contexts[chunk] = (x, t)
    expected._block, expected._steering.cond = blocks, new
    assert len(session._steering._contexts) == blocks > len(kept)
    session.set_condition(new, mode="recache")
    session._steering.apply(session._steering.due(session.loop)[0], session.loop, block=blocks)
    states = [(s.loop.canvas.policy.state(), [c.state()["store"] for c in s.loop.cache.branches]) for s in sessions]
    torch.testing.assert_close(*states, rtol=0, atol=1e-9)
    found, wanted = (torch.cat([s.step().latents for _ in range(6)], dim=2) for s in sessions)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
