"""One network, many uses: packed, streamed, cached and windowed passes of the same frames agree
(float64).
"""

from __future__ import annotations

import pytest
import torch

from rcm.nets.kv_cache import KVCache
from rcm.nets.layout import TokenLayout
from tests.support.tiny_nets import GRID, PATTERNS, condition, frame_times, latents, pattern, tiny_net

REACH = [{}, {"window": 2}, {"window": 2, "sinks": 1}]
TOLERANCE = {"rtol": 0, "atol": 1e-12}


def cache_for(net, frames: int, **options) -> KVCache:
    return KVCache(net.config.num_layers, capacity_tokens=frames * GRID[0] * GRID[1], **options)


def fill(net, cache, x, t, cond, *, name: str, blocks: int, **reach) -> list[torch.Tensor]:
    """Append blocks one by one; the outputs of each pass."""
    outputs = []
    for block, (start, stop) in enumerate(pattern(name).bounds(x.shape[2])[:blocks]):
        layout = TokenLayout.cached_chunk(block, grid=GRID, pattern=pattern(name), num_frames=x.shape[2], **reach)
        outputs.append(net(x[:, :, start:stop], t[:, start:stop], cond, layout, cache.append()))
    return outputs


@pytest.mark.parametrize("keys", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("reach", REACH, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_chunk_by_chunk_append_equals_one_masked_pass(name, reach, keys):
    frames, net = PATTERNS[name], tiny_net()
    x, t, cond = latents(frames), frame_times(frames), condition(net.config)
    whole = net(x, t, cond, TokenLayout.block_causal(frames, grid=GRID, pattern=pattern(name), **reach))
    cache = cache_for(net, frames, keys=keys)
    streamed = fill(net, cache, x, t, cond, name=name, blocks=pattern(name).num_blocks(frames), **reach)
    torch.testing.assert_close(torch.cat(streamed, dim=2), whole, **TOLERANCE)
    tokens = GRID[0] * GRID[1]
    assert [chunk.num_tokens for chunk in cache.chunks] == [(stop - start) * tokens for start, stop in pattern(name).bounds(frames)]
    assert [chunk.positions.frames for chunk in cache.chunks] == [tuple(range(*bounds)) for bounds in pattern(name).bounds(frames)]


@pytest.mark.parametrize("reach", REACH, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_packed_teacher_forcing_equals_streaming_over_a_clean_cache(name, reach):
    frames, net = PATTERNS[name], tiny_net()
    clean, noisy, cond = latents(frames), latents(frames, seed=9), condition(net.config)
    t_clean, t = frame_times(frames, seed=4) / 10, frame_times(frames)
    structure = {"grid": GRID, "pattern": pattern(name), **reach}
    layout = TokenLayout.teacher_forcing(frames, **structure)
    packed = net(torch.cat([clean, noisy], dim=2), torch.cat([t_clean, t], dim=1), cond, layout)
    assert packed.shape == noisy.shape

    cache = cache_for(net, frames)
    fill(net, cache, clean, t_clean, cond, name=name, blocks=pattern(name).num_blocks(frames), **reach)
    for block, (start, stop) in enumerate(pattern(name).bounds(frames)):
        layout = TokenLayout.cached_chunk(block, num_frames=frames, **structure)
        v = net(noisy[:, :, start:stop], t[:, start:stop], cond, layout, cache.readonly(block))
        torch.testing.assert_close(v, packed[:, :, start:stop], **TOLERANCE)

    layout = TokenLayout.noisy_over_context(frames, **structure)
    torch.testing.assert_close(net(noisy, t, cond, layout, cache.readonly()), packed, **TOLERANCE)


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_context_pass_commits_a_chunk_per_block(name):
    frames, net = PATTERNS[name], tiny_net()
    x, t, cond = latents(frames), frame_times(frames), condition(net.config)
    at_once, by_chunk = cache_for(net, frames), cache_for(net, frames)
    net(x, t, cond, TokenLayout.context(frames, grid=GRID, pattern=pattern(name)), at_once.append())
    fill(net, by_chunk, x, t, cond, name=name, blocks=pattern(name).num_blocks(frames))
    assert [chunk.spans for chunk in at_once.chunks] == [chunk.spans for chunk in by_chunk.chunks]
    start, stop = pattern(name).bounds(frames)[1]
    layout = TokenLayout.cached_chunk(1, grid=GRID, pattern=pattern(name), num_frames=frames)
    results = [net(x[:, :, start:stop], t[:, :1], cond, layout, cache.readonly(1)) for cache in (at_once, by_chunk)]
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_noisy_block_ignores_clean_blocks_from_its_own_on_and_other_noisy_blocks(name):
    frames, net = PATTERNS[name], tiny_net()
    clean, noisy, cond, t = latents(frames), latents(frames, seed=9), condition(net.config), frame_times(2 * frames)
    layout = TokenLayout.teacher_forcing(frames, grid=GRID, pattern=pattern(name))
    base = net(torch.cat([clean, noisy], dim=2), t, cond, layout)
    for start, stop in pattern(name).bounds(frames):
        other_clean, other_noisy = clean.clone(), latents(frames, seed=10)
        other_clean[:, :, start:] += 1
        other_noisy[:, :, start:stop] = noisy[:, :, start:stop]
        moved = net(torch.cat([other_clean, other_noisy], dim=2), t, cond, layout)
        torch.testing.assert_close(moved[:, :, start:stop], base[:, :, start:stop], **TOLERANCE)
        if start:
            other_clean[:, :, :start] += 1
            moved = net(torch.cat([other_clean, other_noisy], dim=2), t, cond, layout)
            assert (moved - base)[:, :, start:stop].abs().max() > 1e-3, "a noisy block must see earlier clean blocks"


@torch.no_grad()
def test_readonly_leaves_the_cache_bit_identical_and_transient_equals_concat():
    frames, net, name = 4, tiny_net(), "c1-1"
    x, t, cond = latents(frames), frame_times(frames), condition(net.config)
    cache = cache_for(net, frames)
    fill(net, cache, x, t, cond, name=name, blocks=2)
    before = [[b[:, : cache.num_tokens].clone() for b in pair] for pair in cache.store.buffers]
    chunks = cache.chunks
    layout = TokenLayout.cached_chunk(2, grid=GRID, pattern=pattern(name), num_frames=frames)
    concat = net(x[:, :, 2:3], t[:, :1], cond, layout, cache.readonly(2))
    for _ in range(2):  # the second write goes to the same place
        transient = net(x[:, :, 2:3], t[:, :1], cond, layout, cache.readonly(2, transient=True))
        torch.testing.assert_close(transient, concat, rtol=0, atol=0)
    assert cache.chunks == chunks
    for pair, (k, v) in zip(cache.store.buffers, before, strict=True):
        assert torch.equal(pair[0][:, : cache.num_tokens], k) and torch.equal(pair[1][:, : cache.num_tokens], v)


@torch.no_grad()
def test_time_per_sample_equals_the_same_time_per_frame():
    net, cond = tiny_net(), condition(tiny_net().config)
    x, t = latents(3), torch.tensor([[300.0], [700.0]], dtype=torch.float64)
    layout = TokenLayout.bidirectional(3, grid=GRID)
    constant = net(x, t, cond, layout)
    torch.testing.assert_close(net(x, t.expand(2, 3), cond, layout), constant, **TOLERANCE)
    moved = t.repeat(1, 3)
    moved[:, 2] += 100
    assert (net(x, moved, cond, layout) - constant)[:, :, 2].abs().max() > 1e-2


def test_append_and_readonly_give_the_same_gradients():
    """Earlier chunks are constants in both; the chunk's own keys and values carry gradient in
    both.
    """
    frames, name = 4, "c1-1"
    net = tiny_net()
    x, cond, t = latents(frames), condition(net.config), frame_times(frames)
    cache = cache_for(net, frames)
    with torch.no_grad():
        fill(net, cache, x, t, cond, name=name, blocks=3)
    layout = TokenLayout.cached_chunk(3, grid=GRID, pattern=pattern(name), num_frames=frames)
    readonly = torch.autograd.grad(net(x[:, :, 3:], t[:, :1], cond, layout, cache.readonly(3)).square().sum(), list(net.parameters()))
    appended = torch.autograd.grad(net(x[:, :, 3:], t[:, :1], cond, layout, cache.append()).square().sum(), list(net.parameters()))
    for name, a, b in zip(dict(net.named_parameters()), readonly, appended, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
        assert a.abs().max() > 0, name
