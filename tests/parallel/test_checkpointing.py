"""Activation checkpointing recomputes when it should, steps aside when it should, and renames
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels import replay
from rcm.kernels.masked_attention import api as masked_api
from rcm.nets.condition import Condition
from rcm.nets.kv_cache import KVCache
from rcm.nets.layout import TokenLayout
from rcm.nets.wan.model import WanDiT
from rcm.parallel.checkpointing import MODES, SACConfig, checkpoint_blocks
from tests.support.tiny_nets import GRID, condition, latents, tiny_net
from tests.support.toy_method import CHANNELS, CONFIG, FRAMES, HEIGHT, LAYOUT, WIDTH, make_net
from tests.support.watched import Watched

TOKENS = LAYOUT.num_tokens
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]


@contextmanager
def attentions() -> Iterator[Counter[int]]:
    """Fused attention operators as they are executed, by the number of keys."""
    keys: Counter[int] = Counter()

    def see(func, args) -> None:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            keys[args[1].shape[2]] += 1

    with Watched(see):
        yield keys


def prepared(mode: str, *, every: int = 1, keep_last: int = 0, layers: int = CONFIG.num_layers) -> tuple[WanDiT, Counter]:
    """A network under `mode` that counts how often each block's feed-forward runs."""
    net, runs = tiny_net(attention="sdpa", **asdict(CONFIG) | {"num_layers": layers}), Counter()
    for i, block in enumerate(net.blocks):
        block.ffn.register_forward_hook(lambda *_, i=i: runs.update([i]))
    checkpoint_blocks(net, mode=mode, every=every, keep_last=keep_last)
    return net, runs


def forward(net: WanDiT, cache=None) -> torch.Tensor:
    x = torch.linspace(-1, 1, CHANNELS * FRAMES * HEIGHT * WIDTH, dtype=torch.float64).view(1, CHANNELS, FRAMES, HEIGHT, WIDTH)
    text = torch.linspace(-1, 1, 5 * CONFIG.text_dim, dtype=torch.float64).view(1, 5, -1)
    return net(x, torch.full((1, 1), 300.0, dtype=torch.float64), Condition(text), LAYOUT, cache)


RECOMPUTING = [mode for mode in MODES if mode != "none"]
KEEPING = [mode for mode in MODES if mode.startswith("block_wise_keep_attention")]


@pytest.mark.parametrize(("mode", "runs_with_gradient"), [("none", 1), *((mode, 2) for mode in RECOMPUTING)])
def test_gradients_are_the_same_and_blocks_run_as_often_as_the_mode_says(mode: str, runs_with_gradient: int) -> None:
    plain, _ = prepared("none")
    forward(plain).square().mean().backward()
    net, runs = prepared(mode)
    assert sorted(net.state_dict()) == sorted(plain.state_dict())
    forward(net).square().mean().backward()
    assert set(runs.values()) == {runs_with_gradient}
    for (name, p), (_, q) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("mode", RECOMPUTING)
@pytest.mark.parametrize(
    ("every", "kept", "again"),
    [(1, 0, {0, 1, 2, 3, 4}), (2, 0, {0, 2, 4}), (3, 0, {0, 3}), (9, 0, {0}), (1, 1, {0, 1, 2, 3}), (2, 1, {0, 2}), (1, 7, set())],
)
def test_every_nth_block_but_the_last_runs_again(mode: str, every: int, kept: int, again: set[int]) -> None:
    """Blocks 0, n, 2n, ... run twice, the others and the last ones once and keep all their
    products; the gradient is that of no recomputation.
    """
    plain, _ = prepared("none", layers=5)
    forward(plain).square().mean().backward()
    net, runs = prepared(mode, every=every, keep_last=kept, layers=5)
    with attentions() as keys:
        forward(net).square().mean().backward()
    assert {i for i, count in runs.items() if count == 2} == again
    assert sum(runs.values()) == 5 + len(again)
    assert keys[CONFIG.text_len] == 5 + len(again) * (mode != "mm_only")
    for (name, p), (_, q) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_which_products_run_again() -> None:
    """None of them, or one less per block where the MLP's result is kept."""
    counts = {}
    for mode in MODES:
        net, _ = prepared(mode)
        seen = Counter()
        with Watched(lambda func, _, seen=seen: seen.update([func])):
            loss = forward(net).square().mean()
            loss.backward()
        counts[mode] = sum(seen[product] for product in PRODUCTS)
    assert counts["none"] == counts["mm_only"] < counts["block_wise"] == counts["block_wise_keep_attention"]
    assert counts["block_wise_keep_attention_mlp"] == counts["block_wise"] - CONFIG.num_layers


@pytest.mark.parametrize(("mode", "selfs", "crosses"), [("block_wise", 2, 2), *((mode, 1, 2) for mode in KEEPING), ("mm_only", 1, 1)])
def test_which_attention_runs_again(mode: str, selfs: int, crosses: int) -> None:
    net, _ = prepared(mode)
    with attentions() as keys:
        forward(net).square().mean().backward()
    assert keys == {TOKENS: selfs * CONFIG.num_layers, CONFIG.text_len: crosses * CONFIG.num_layers}


class _Launched(torch.autograd.Function):
    """Mean over the keys' values as a stand-in for a kernel of this package: its launch is no
    operator of torch.
    """

    launches = 0

    @staticmethod
    def forward(ctx, q, k, v):
        def launch() -> tuple[torch.Tensor, ...]:
            _Launched.launches += 1
            return v.mean(dim=1, keepdim=True).expand_as(q).clone(), v.new_ones(1)

        o, other = replay.kept(launch)
        ctx.save_for_backward(o, other)
        ctx.keys = v.shape[1]
        return o

    @staticmethod
    def backward(ctx, grad):
        _, other = ctx.saved_tensors
        return torch.zeros_like(grad), None, (other * grad.sum(dim=1, keepdim=True) / ctx.keys).expand(-1, ctx.keys, -1, -1)


@pytest.mark.parametrize(("mode", "launches"), [("none", 1), ("block_wise", 2), *((mode, 1) for mode in KEEPING), ("mm_only", 1)])
def test_kernels_behind_kept_are_not_launched_again(mode: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def grad(chosen: str) -> torch.Tensor:
        net, _ = prepared(chosen)
        for block in net.blocks:
            monkeypatch.setattr(block.self_attn.core.attention, "backend", lambda q, k, v, mask, scale: _Launched.apply(q, k, v))
        _Launched.launches = 0
        forward(net).square().mean().backward()
        return net.blocks[0].self_attn.v.weight.grad

    plain = grad("none")
    got = grad(mode)
    assert _Launched.launches == launches * CONFIG.num_layers
    torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_steps_aside_without_gradient_and_in_cache_append(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even torch's checkpoint is called: torch 2.11's raises on dual tensors, gradients enabled
    or not.
    """
    net, runs = prepared(mode)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.utils.checkpoint was called")

    monkeypatch.setattr("rcm.parallel.checkpointing.checkpoint", refuse)
    with torch.no_grad():
        forward(net)
    assert set(runs.values()) == {1}
    runs.clear()
    cache = KVCache(CONFIG.num_layers, capacity_tokens=TOKENS)
    forward(net, cache.append()).square().mean().backward()
    assert set(runs.values()) == {1}, "an append forward was recomputed"


def test_readonly_forward_is_recomputed_against_the_same_prefix() -> None:
    layout = TokenLayout(LAYOUT.grid, LAYOUT.frame_index, type(LAYOUT.mask)(TOKENS, 2 * TOKENS), LAYOUT.output, context_tokens=TOKENS)
    gradients = []
    for mode in ("none", "block_wise"):
        net, runs = prepared(mode)
        cache = KVCache(CONFIG.num_layers, capacity_tokens=2 * TOKENS)
        with torch.no_grad():
            forward(net, cache.append())
        runs.clear()
        x = torch.ones(1, CHANNELS, FRAMES, HEIGHT, WIDTH, dtype=torch.float64)
        text = torch.ones(1, 5, CONFIG.text_dim, dtype=torch.float64)
        net(x, torch.full((1, 1), 10.0, dtype=torch.float64), Condition(text), layout, cache.readonly()).square().mean().backward()
        gradients.append(net.blocks[0].self_attn.k.weight.grad)
    assert set(runs.values()) == {2}
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", ["block_wise_keep_attention", "mm_only"])
def test_masks_of_many_chunks_stay_known_until_the_backward_pass(mode: str) -> None:
    """Selective recomputation refuses an operator that its forward did not run, such as making a
    forgotten mask again.
    """
    frames = 11
    net, pattern = tiny_net(attention="reference"), BlockPattern(1, 1)
    checkpoint_blocks(net, mode=mode)
    cache = KVCache(net.config.num_layers, capacity_tokens=frames * GRID[0] * GRID[1])
    x, text, time = latents(frames), condition(net.config), torch.full((2, 1), 300.0, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for block in range(frames):
        layout = TokenLayout.cached_chunk(block, grid=GRID, pattern=pattern, num_frames=frames, window=2)
        chunk = x[:, :, block : block + 1]
        loss = loss + net(chunk, time, text, layout, cache.readonly()).square().mean()
        with torch.no_grad():
            net(chunk, time, text, layout, cache.append())
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_a_second_backward_pass_says_why_it_is_refused() -> None:
    net, _ = prepared("block_wise_keep_attention")
    loss = forward(net).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        loss.backward()


def test_unknown_mode_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="net.sac_config.mode.*mm_only"):
        checkpoint_blocks(make_net(seed=0), mode="blockwise")
    with pytest.raises(ConfigError, match="every_n_blocks=0 must be at least 1"):
        checkpoint_blocks(make_net(seed=0), mode="block_wise", every=0)


def test_masked_attention_keeps_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own attention with gradient is behind `kept`: launched once per block,
    gradients as without recomputation.
    """
    counts: Counter[str] = Counter()

    def counted(*args: object) -> tuple[torch.Tensor, ...]:
        counts[mode] += 1
        return original(*args)

    original = masked_api._forward
    monkeypatch.setattr(masked_api, "_forward", counted)
    gradients = {}
    for mode in ("none", "block_wise", "block_wise_keep_attention"):
        net, _ = prepared(mode)
        own = partial(masked_api.masked_attention, forward="reference", backward="eager")
        for block in net.blocks:
            monkeypatch.setattr(block.self_attn.core.attention, "backend", own)
        forward(net).square().mean().backward()
        gradients[mode] = net.blocks[0].self_attn.q.weight.grad
    layers = CONFIG.num_layers
    assert counts == {"none": layers, "block_wise": 2 * layers, "block_wise_keep_attention": layers}
    for mode in ("block_wise", "block_wise_keep_attention"):
        torch.testing.assert_close(gradients[mode], gradients["none"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"mode": "all"}, "mode='all' is not one of 'none'"), ({"every_n_blocks": "2"}, "every_n_blocks='2' must be a whole number"),
     ({"keep_last_blocks": 1.5}, "keep_last_blocks=1.5 must be a whole number")],
)  # fmt: skip
def test_settings_of_another_kind_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        SACConfig(**options)
