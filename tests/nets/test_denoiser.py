"""Denoisers: casts at the door, TrigFlow view, guidance with paired caches, experts by time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided, PairedCache
from rcm.nets.kv_cache import KVCache
from rcm.nets.layout import TokenLayout
from rcm.nets.velocity_model import VelocityModel
from tests.support.tiny_nets import GRID, condition, latents, pattern, tiny_net
from tests.support.toy_extensions import Mixer

FP64 = Precision.preset("fp64")
LAYOUT = TokenLayout.bidirectional(3, grid=GRID)
TIME = torch.tensor([[0.7], [0.2]], dtype=torch.float64)


def denoiser(seed: int = 0, **changes) -> Denoiser:
    return Denoiser(tiny_net(seed=seed, **changes), FP64).eval_params()


def test_what_the_network_receives_and_what_comes_back():
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x, timestep, cond, layout, cache=None):
            seen.update(x=x, timestep=timestep, text=cond.text, layout=layout, cache=cache)
            return x.float()

    for preset, x_dtype, out_dtype in (
        ("bf16", torch.float32, torch.float32),
        ("bf16_fp32_time", torch.float64, torch.float64),
        ("fp64", torch.bfloat16, torch.float32),
    ):
        precision = Precision.preset(preset)
        x, time = latents(3, dtype=x_dtype), torch.tensor([[0.7021], [0.3]], dtype=torch.float64)
        v = Denoiser(Spy(), precision).velocity(x, time, condition(tiny_net().config), LAYOUT, cache="view")
        assert (seen["x"].dtype, seen["text"].dtype, seen["timestep"].dtype) == (precision.compute, precision.compute, precision.time)
        assert v.dtype == out_dtype and seen["layout"] is LAYOUT and seen["cache"] == "view"
        expected = {torch.bfloat16: 704.0, torch.float32: 702.1, torch.float64: 702.1}[precision.time]
        assert seen["timestep"][0, 0].item() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_trig_F_has_the_same_data_prediction_as_the_velocity():
    """cos x_tau - sin F = x_t - t v, at x_t = x_tau / (cos + sin), t = sin / (cos + sin)."""
    d, x, tau, cond = denoiser(), latents(3), torch.tensor([[0.4], [1.2]], dtype=torch.float64), condition(tiny_net().config)
    cos, sin = tau.cos()[:, :, None, None, None], tau.sin()[:, :, None, None, None]
    x_t, t = x / (cos + sin), tau.sin() / (tau.cos() + tau.sin())
    from_v = x_t - t[:, :, None, None, None] * d.velocity(x_t, t, cond, LAYOUT)
    torch.testing.assert_close(cos * x - sin * d.trig_F(x, tau, cond, LAYOUT), from_v, rtol=0, atol=1e-12)
    assert torch.isfinite(d.trig_F(x, torch.zeros_like(tau), cond, LAYOUT)).all()


@torch.no_grad()
def test_guidance():
    d, cond, x = denoiser(), condition(tiny_net().config), latents(3)
    negative = condition(d.net.config, batch=1, seed=11)
    v, v_negative = d.velocity(x, TIME, cond, LAYOUT), d.velocity(x, TIME, negative.expand(2), LAYOUT)
    torch.testing.assert_close(Guided(d, negative, 3.0).velocity(x, TIME, cond, LAYOUT), v_negative + 3 * (v - v_negative))
    calls = []
    d.net.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(Guided(d, negative, 1.0).velocity(x, TIME, cond, LAYOUT), v, rtol=0, atol=0)
    assert len(calls) == 1, "no negative pass at scale 1"
    tau = torch.tensor([[0.4], [1.2]], dtype=torch.float64)
    F, F_negative = d.trig_F(x, tau, cond, LAYOUT), d.trig_F(x, tau, negative.expand(2), LAYOUT)
    torch.testing.assert_close(Guided(d, negative, 5.0).trig_F(x, tau, cond, LAYOUT), F_negative + 5 * (F - F_negative))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("keys", ["post_rope", "pre_rope"])
@torch.no_grad()
def test_a_context_pass_leaves_what_a_velocity_leaves_and_computes_less(keys, guided):
    """Keys and values of every layer, and what an observer sees, bit by bit; nothing behind the
    last block's keys runs.
    """
    d, x = denoiser(), latents(3)
    cond, ran = condition(d.net.config), []
    model = Guided(d, condition(d.net.config, batch=1, seed=11), 3.0) if guided else d
    last = d.net.blocks[-1]
    for module in (last.self_attn.core.attention, last.self_attn.o, last.cross_attn, last.ffn, d.net.head):
        module.register_forward_hook(lambda *_: ran.append(1))
    kept, seen = [], []
    for name in ("velocity", "enter_context"):
        cache, shown = model.new_cache(num_frames=3, grid=GRID, keys=keys), []
        observers = tuple((lambda layer, q, k, shown=shown: shown.append((q.clone(), k.clone()))) for _ in cache.branches)
        for block in range(3):
            view = cache.append(observers=observers)
            layout = TokenLayout.over_cache((block,), grid=GRID, context_tokens=view.prefix_tokens)
            ran.clear()
            returned = getattr(model, name)(x[:, :, block : block + 1], TIME, cond, layout, cache=view)
            assert bool(ran) == (name == "velocity") == (returned is not None)
        kept.append([branch.state()["store"] for branch in cache.branches])
        seen.append(shown)
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=0)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    assert len(seen[0]) == 3 * 2 * (2 if guided else 1)


@torch.no_grad()
def test_guided_streaming_equals_two_separate_streams():
    d, x = denoiser(), latents(3)
    cond, negative = condition(d.net.config), condition(d.net.config, batch=1, seed=11)
    guided = Guided(d, negative, 3.0)
    structure = {"grid": guided.token_grid(4, 6), "pattern": pattern("c1-1"), "num_frames": 3}
    paired = guided.new_cache(num_frames=3, grid=GRID)
    alone = [d.new_cache(num_frames=3, grid=GRID) for _ in range(2)]
    for block in range(3):
        layout, frame = TokenLayout.cached_chunk(block, **structure), x[:, :, block : block + 1]
        read = guided.velocity(frame, TIME, cond, layout, cache=paired.readonly(block))
        got = guided.velocity(frame, TIME, cond, layout, cache=paired.append())
        v, v_negative = (
            d.velocity(frame, TIME, c, layout, cache=own.append()) for c, own in zip((cond, negative.expand(2)), alone, strict=True)
        )
        torch.testing.assert_close(got, v_negative + 3 * (v - v_negative))
        torch.testing.assert_close(read, got)
    assert (paired.num_chunks, paired.num_tokens, paired.negative.num_chunks) == (3, 18, 3)
    with pytest.raises(TypeError, match="PairedCache"):
        guided.velocity(x[:, :, :1], TIME, cond, layout, cache=alone[0].readonly())
    off = Guided(d, negative, 1.0).new_cache(num_frames=3, grid=GRID)
    assert off.negative is None and off.readonly().negative is None
    with pytest.raises(ValueError, match="made without"):
        guided.velocity(x[:, :, :1], TIME, cond, TokenLayout.cached_chunk(0, **structure), cache=off.readonly())
    paired.reset()
    assert paired.cond.num_tokens == paired.negative.num_tokens == 0


@torch.no_grad()
def test_negative_prompt_takes_the_image_of_the_sample():
    d, x = denoiser(in_dim=6, image_branch=True), latents(3)
    full = replace(condition(d.net.config), concat=latents(3, channels=2))
    text = Condition(condition(d.net.config, batch=1, seed=11).text)
    by_hand = replace(text.expand(2), concat=full.concat, image=full.image)
    v, v_negative = d.velocity(x, TIME, full, LAYOUT), d.velocity(x, TIME, by_hand, LAYOUT)
    torch.testing.assert_close(Guided(d, text, 2.0).velocity(x, TIME, full, LAYOUT), v_negative + 2 * (v - v_negative))


@torch.no_grad()
def test_prepared_conditions_and_frozen_parameters():
    d, x, cond = denoiser(), latents(3), condition(tiny_net().config)
    assert not any(p.requires_grad for p in d.net.parameters()) and not d.net.training
    torch.testing.assert_close(d.velocity(x, TIME, d.prepare(cond), LAYOUT), d.velocity(x, TIME, cond, LAYOUT), rtol=0, atol=0)
    cache = d.new_cache(num_frames=2, grid=GRID, keys="pre_rope")
    assert isinstance(cache, KVCache) and (cache.num_layers, cache.capacity_tokens, cache.keys) == (2, 12, "pre_rope")
    assert isinstance(Guided(d, cond, 2.0).new_cache(num_frames=2, grid=GRID), PairedCache)


def test_conditions():
    one, two = Condition(torch.randn(1, 3, 4), image=torch.randn(1, 2, 5)), Condition(torch.randn(2, 3, 4))
    assert two.expand(2) is two and one.expand(3).batch == 3 and one.expand(3).image.shape == (3, 2, 5)
    with pytest.raises(ValueError, match="batch 2 does not expand to batch 3"):
        two.expand(3)
    moved = one.to(dtype=torch.float64)
    assert moved.text.dtype == moved.image.dtype == torch.float64 and moved.concat is None


def test_a_model_says_what_it_is_asked_for():
    """`velocity` always, the rest for the uses that need it."""
    with pytest.raises(TypeError, match="abstract.* '?velocity'?"):
        VelocityModel()
    mixer, cond = Mixer(2), condition(tiny_net().config)
    uses = {"new_cache": lambda: mixer.new_cache(num_frames=2, grid=GRID), "prepare": lambda: mixer.prepare(cond)}
    for name, use in {**uses, "rope": lambda: mixer.rope, "fused": lambda: mixer.fused}.items():
        with pytest.raises(NotImplementedError, match=f"Mixer has no `{name}`, which .* docs/extending.md"):
            use()
