"""Bookkeeping, refusals, compaction and codecs of the cache; its use by the network is in test_wan_equivalence.py."""

from __future__ import annotations

import pytest
import torch

from rcm.core.dual import jvp
from rcm.kernels.masks import Full
from rcm.nets.kv_cache import KVCache
from rcm.nets.layout import TokenLayout
from tests.support.tiny_nets import GRID, condition, frame_times, latents, pattern, tiny_net

S = 6


def tokens(count: int, *, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, count, 3, 4), torch.randn(batch, count, 3, 4)


def chunk(frames: int, *, after: int) -> TokenLayout:
    count = frames * S
    return TokenLayout(GRID, tuple(range(after, after + frames)), Full(count, count + after * S), (0, frames), context_frames=after)


def filled(*frames: int, **options) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """A one-layer cache holding chunks of so many frames, and everything that went in."""
    cache, keys, values, after = KVCache(1, capacity_tokens=60, **options), [], [], 0
    for count in frames:
        k, v = tokens(count * S)
        view = cache.append()
        view.begin(chunk(count, after=after))
        view.layer(0).assemble(k, v)
        view.commit(chunk(count, after=after))
        keys.append(k)
        values.append(v)
        after += count
    return cache, torch.cat(keys, dim=1), torch.cat(values, dim=1)


def test_prefixes():
    cache, k, v = filled(1, 3, 2)
    assert (cache.num_chunks, cache.num_tokens, cache.chunk_ends) == (3, 36, [6, 24, 36])
    assert cache.frame_index == tuple(range(6))
    own = tokens(5)
    for chunks, end in ((None, 36), (3, 36), (2, 24), (1, 6), (0, 0)):
        view = cache.readonly(chunks)
        k_all, v_all = view.layer(0).assemble(*own)
        assert view.prefix_tokens == end
        assert torch.equal(k_all, torch.cat([k[:, :end], own[0]], dim=1)) and torch.equal(v_all, torch.cat([v[:, :end], own[1]], dim=1))
    with pytest.raises(ValueError, match="negative"):
        cache.readonly(-1)
    with pytest.raises(IndexError, match="holds 3"):
        cache.readonly(4)


def test_append_stores_detached_and_keeps_the_gradient_of_its_own_tokens():
    cache, past, _ = filled(1)
    k, v = (x.requires_grad_() for x in tokens(S))
    view = cache.append()
    assert view.layer(0).appends and not cache.readonly().layer(0).appends
    k_all, v_all = view.layer(0).assemble(k, v)
    assert k_all.requires_grad and torch.equal(k_all[:, :S], past)
    (k_all.square().sum() + v_all.sum()).backward()
    torch.testing.assert_close(k.grad, 2 * k.detach())
    view.begin(chunk(1, after=1))
    view.commit(chunk(1, after=1))
    stored, _ = cache.readonly().layer(0).assemble(*tokens(1))
    assert not stored.requires_grad and torch.equal(stored[:, S : 2 * S], k)


def test_a_forward_that_fails_midway_leaves_the_cache_unchanged():
    cache, k, _ = filled(1)
    view = cache.append()
    view.begin(chunk(1, after=1))
    view.layer(0).assemble(*tokens(S))  # never committed
    assert cache.num_tokens == S
    view = cache.append()
    view.begin(chunk(1, after=1))
    k_all, _ = view.layer(0).assemble(*(own := tokens(S)))
    assert torch.equal(k_all, torch.cat([k, own[0]], dim=1))


def test_capacity_and_context_are_checked_before_any_write():
    cache, *_ = filled(4, 4)
    for view in (cache.append(), cache.readonly(transient=True)):
        with pytest.raises(RuntimeError, match="18 tokens after 48 exceed capacity_tokens=60"):
            view.begin(chunk(3, after=8))
    cache.readonly().begin(chunk(3, after=8))
    with pytest.raises(ValueError, match="expects 42 cached tokens .* shows 48"):
        cache.readonly().begin(chunk(1, after=7))
    used = cache.append()
    used.begin(chunk(1, after=8))
    used.layer(0).assemble(*tokens(S))
    used.commit(chunk(1, after=8))
    with pytest.raises(RuntimeError, match="one forward"):
        used.begin(chunk(1, after=8))
    with pytest.raises(ValueError, match="capacity_tokens=0"):
        KVCache(1, capacity_tokens=0)
    with pytest.raises(ValueError, match="pre_rope"):
        KVCache(1, capacity_tokens=1, keys="rope")


def test_duals_enter_readonly_and_nothing_else():
    cache, past, _ = filled(1)
    k, v = tokens(S)
    dot = torch.randn_like(k)
    value, tangent = jvp(lambda y: cache.readonly().layer(0).assemble(y, v)[0], (k,), (dot,))
    assert torch.equal(value, torch.cat([past, k], dim=1))
    assert torch.equal(tangent, torch.cat([torch.zeros_like(past), dot], dim=1))
    for view, message in ((cache.append(), "append under a dual level"), (cache.readonly(transient=True), "neither tangents")):
        with pytest.raises(RuntimeError, match=message):
            jvp(lambda y, view=view: view.layer(0).assemble(y, v)[0], (k,), (dot,))
    with pytest.raises(RuntimeError, match="append under a dual level"):
        jvp(lambda y: cache.append().begin(chunk(1, after=1)) or y, (k,), (dot,))
    assert cache.num_tokens == S


def test_transient_writes_in_place_without_a_copy():
    cache, past, _ = filled(1, 1)
    k, v = tokens(S)
    first, _ = cache.readonly(2, transient=True).layer(0).assemble(k, v)
    second, _ = cache.readonly(2, transient=True).layer(0).assemble(*(again := tokens(S)))
    assert first.data_ptr() == second.data_ptr() == cache._layers[0]._buffers[0].data_ptr()
    assert torch.equal(second, torch.cat([past, again[0]], dim=1)) and cache.num_tokens == 2 * S
    with pytest.raises(ValueError, match="overwrite"):
        cache.readonly(1, transient=True)
    with pytest.raises(RuntimeError, match="gradients"):
        cache.readonly(transient=True).layer(0).assemble(k.requires_grad_(), v)


@pytest.mark.parametrize("per_sample", [False, True])
def test_compaction(per_sample):
    cache, k, v = filled(1, 2, 1)
    index = torch.tensor([[20, 0, 3, 7], [1, 1, 23, 12]]) if per_sample else torch.tensor([20, 0, 3, 7])
    expected = [torch.stack([x[b, index[b] if per_sample else index] for b in range(2)]) for x in (k, v)]
    cache.compact_(index)
    assert (cache.chunk_ends, cache.frame_index) == ([4], None)
    k_all, v_all = cache.readonly(1).layer(0).assemble(*(own := tokens(2)))
    assert torch.equal(k_all, torch.cat([expected[0], own[0]], dim=1)) and torch.equal(v_all, torch.cat([expected[1], own[1]], dim=1))


def test_compaction_edges():
    cache, *_ = filled(1, 2)
    view = cache.readonly(1)
    for bad in (torch.tensor([18]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="holds 18"):
            cache.compact_(bad)
    with pytest.raises(ValueError, match=r"\[B, budget\]"):
        cache.compact_(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="integers"):
        cache.compact_(torch.zeros(3))
    with pytest.raises(ValueError, match="3 samples"):
        cache.compact_(torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="capacity"):
        cache.compact_(torch.zeros(61, dtype=torch.long))
    cache.compact_(None)
    assert cache.num_chunks == 2
    cache.compact_(torch.arange(6, 18), frame_index=(4, 5))
    assert cache.frame_index == (4, 5)
    with pytest.raises(RuntimeError, match="compacted"):
        view.layer(0).assemble(*tokens(S))
    cache.compact_(torch.zeros(0, dtype=torch.long))
    assert (cache.num_tokens, cache.num_chunks, cache.frame_index) == (0, 0, ())
    cache.compact_(torch.arange(3))  # nothing there: nothing happens
    assert cache.num_tokens == 0


def test_reset_keeps_or_frees_buffers():
    cache, *_ = filled(2)
    buffers = cache._layers[0]._buffers
    cache.reset(free_buffers=False)
    assert cache.num_tokens == 0 and cache._layers[0]._buffers is buffers
    with pytest.raises(ValueError, match="another batch"):
        cache.append().layer(0).assemble(*tokens(S, batch=1))
    cache.reset()
    assert cache._layers[0]._buffers is None
    cache.append().layer(0).assemble(*tokens(S, batch=1))


class Halving:
    """A lossy codec that shows itself: decode(encode(x)) = x / 2."""

    def __init__(self):
        self.calls = []

    def encode(self, x, *, side, layer):
        self.calls.append((side, layer, x.shape[1]))
        return x.clone()

    def decode(self, blob, *, side):
        return blob / 2


def test_codec_sees_chunks_and_its_result_is_what_is_read():
    codec = Halving()
    cache, k, _ = filled(1, 2, codec=codec)
    assert codec.calls == [("key", 0, S), ("value", 0, S), ("key", 0, 2 * S), ("value", 0, 2 * S)]
    k_all, _ = cache.readonly(1).layer(0).assemble(*(own := tokens(S)))
    assert torch.equal(k_all, torch.cat([k[:, :S] / 2, own[0]], dim=1))
    k_all, _ = cache.append().layer(0).assemble(*own)
    assert torch.equal(k_all, torch.cat([k, own[0]], dim=1) / 2), "in append a chunk attends to its coded self"
    assert torch.equal(cache.readonly().layer(0).assemble(*own)[0], torch.cat([k / 2, own[0]], dim=1))
    with pytest.raises(ValueError, match="codec"):
        cache.readonly(transient=True)
    cache.compact_(torch.arange(6, 18))
    k_all, _ = cache.readonly().layer(0).assemble(*own)
    assert torch.equal(k_all[:, :12], k[:, 6:] / 4)


@torch.no_grad()
def test_pre_rope_keys_can_be_renumbered():
    """Dropping the first frame and renumbering the rest is a video that starts a frame later; post-RoPE keys keep absolute positions."""
    net, structure = tiny_net(), {"grid": GRID, "pattern": pattern("c1-1")}
    x, t, cond = latents(3), frame_times(3), condition(net.config)
    # every frame attends to itself alone, so the contents of a frame's keys do not depend on the frames before it
    alone = TokenLayout.context(2, window=1, **structure)
    cache = KVCache(net.config.num_layers, capacity_tokens=5 * S, keys="pre_rope")
    net(x[:, :, :2], t[:, :2], cond, alone, cache.append())
    current = TokenLayout(GRID, (1,), Full(S, 2 * S), (0, 1), context_frames=1)

    fresh = KVCache(net.config.num_layers, capacity_tokens=5 * S, keys="pre_rope")
    first = TokenLayout.cached_chunk(0, num_frames=3, **structure)
    net(x[:, :, 1:2], t[:, 1:2], cond, first, fresh.append())
    expected = net(x[:, :, 2:], t[:, 2:], cond, current, fresh.readonly())

    cache.compact_(torch.arange(S, 2 * S))
    with pytest.raises(ValueError, match="frame_index"):
        net(x[:, :, 2:], t[:, 2:], cond, current, cache.readonly())
    cache.frame_index = (0,)
    torch.testing.assert_close(net(x[:, :, 2:], t[:, 2:], cond, current, cache.readonly()), expected, rtol=0, atol=1e-12)
    cache.frame_index = (3,)
    assert (net(x[:, :, 2:], t[:, 2:], cond, current, cache.readonly()) - expected).abs().max() > 1e-3
