"""Bookkeeping, refusals and codecs of the cache; its use by the network is in
test_wan_equivalence.py.
"""

from __future__ import annotations

import pytest
import torch

from rcm.core.dual import jvp
from rcm.kernels.kv_codec.codec import KVCodec as QuantisingCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from rcm.kernels.masks import Full
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_coded import KVCodec
from rcm.nets.kv_store import pieces_of
from rcm.nets.layout import TokenLayout
from rcm.nets.positions import Positions, at_frames
from tests.support.tiny_nets import GRID, condition, frame_times, latents, pattern, tiny_net

S = 6


def tokens(count: int, *, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, count, 3, 4), torch.randn(batch, count, 3, 4)


def chunk(frames: int, *, after: int) -> TokenLayout:
    count = frames * S
    return TokenLayout(GRID, tuple(range(after, after + frames)), Full(count, count + after * S), (0, frames), context_tokens=after * S)


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
    assert (cache.num_chunks, cache.num_tokens, [c.num_tokens for c in cache.chunks]) == (3, 36, [6, 18, 12])
    assert [c.positions.frames for c in cache.chunks] == [(0,), (1, 2, 3), (4, 5)] and [c.id for c in cache.chunks] == [0, 1, 2]
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


@pytest.mark.parametrize(("visible", "one_run"), [(None, True), ([0], False), ([1], False)])
def test_only_one_run_of_slots_can_be_captured(visible, one_run):
    """A captured pass reads the first slots, whatever they hold."""
    cache, _, _ = filled(1, 1)
    view = cache.readonly(visible=visible, transient=True)
    view.begin(chunk(1, after=2 if visible is None else 1))
    assert view.can_be_captured is one_run


def test_append_stores_detached_and_keeps_the_gradient_of_its_own_tokens():
    cache, past, _ = filled(1)
    k, v = (x.requires_grad_() for x in tokens(S))
    view = cache.append()
    view.begin(chunk(1, after=1))
    assert view.layer(0).appends and not cache.readonly().layer(0).appends
    k_all, v_all = view.layer(0).assemble(k, v)
    assert k_all.requires_grad and torch.equal(k_all[:, :S], past)
    (k_all.square().sum() + v_all.sum()).backward()
    torch.testing.assert_close(k.grad, 2 * k.detach())
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
    stale = cache.readonly()
    cache.evict([0])
    with pytest.raises(RuntimeError, match="take a fresh view"):
        stale.layer(0).assemble(*tokens(S))
    for never_dropped in (-1, 1, 9):
        with pytest.raises(ValueError, match=f"chunk {never_dropped} was not dropped"):
            cache.append(as_id=never_dropped)
    with pytest.raises(ValueError, match="capacity_tokens=0"):
        KVCache(1, capacity_tokens=0)
    for wrong in ({"hot_chunks": 1}, {"hot_chunks": -1, "codec": Halving()}):
        with pytest.raises(ValueError, match="hot_chunks must be 0 or more, and 0 without a codec"):
            KVCache(1, capacity_tokens=S, **wrong)
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


def begun(view, frames: int):
    """The first layer of a view whose forward adds so many frames."""
    view.begin(TokenLayout.over_cache(range(50, 50 + frames), grid=GRID, context_tokens=view.prefix_tokens))
    return view.layer(0)


def committed(cache: KVCache, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Append random tokens of so many frames."""
    view = cache.append()
    own = tokens(frames * S)
    begun(view, frames).assemble(*own)
    view.commit(None)
    return own


def test_transient_writes_in_place_without_a_copy():
    cache, past, _ = filled(1, 1)
    k, v = tokens(S)
    first, _ = begun(cache.readonly(2, transient=True), 1).assemble(k, v)
    second, _ = begun(cache.readonly(2, transient=True), 1).assemble(*(again := tokens(S)))
    assert first.data_ptr() == second.data_ptr() == cache.store.buffers[0][0].data_ptr()
    assert torch.equal(second, torch.cat([past, again[0]], dim=1)) and cache.num_tokens == 2 * S
    apart, _ = begun(cache.readonly(1, transient=True), 1).assemble(k, v)
    assert torch.equal(apart, torch.cat([past[:, :S], k], dim=1)), "a part of the cache is read without the rest"
    with pytest.raises(RuntimeError, match="gradients"):
        begun(cache.readonly(transient=True), 1).assemble(k.requires_grad_(), v)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 2, 2, 2, 2), (3, 1, 1, 2, 1), (2, 1, 3, 1, 2)])
def test_a_ring_without_holes(sizes):
    """Chunks come and go in a cache of 36 tokens; what is read is what is held, and always one run
    of the buffer.
    """
    cache = KVCache(1, capacity_tokens=6 * S)
    held: dict[int, torch.Tensor] = {}
    for at, frames in enumerate(sizes * 3):
        while sum(k.shape[1] for k in held.values()) + frames * S > 6 * S:
            oldest = sorted(held)[1 if len(held) > 1 else 0]  # the first one is a sink
            cache.evict([oldest])
            del held[oldest]
        k, _ = committed(cache, frames)
        assert cache.chunks[-1].id == at, "ids are stable and count appended chunks"
        held[at] = k
        read, _ = cache.store.read(0, sorted(p for c in cache.chunks for p in pieces_of(c.spans, chunk=c.id)))
        assert read.shape[1] == cache.num_tokens and read.data_ptr() == cache.store.buffers[0][0].data_ptr()
        for chunk_id, expected in held.items():
            spans = cache.chunk(chunk_id).spans
            assert torch.equal(torch.cat([cache.store.buffers[0][0][:, a:b] for a, b in spans], dim=1), expected)
    with pytest.raises(IndexError, match="chunk 99 is not in the cache"):
        cache.evict([99])


@pytest.mark.parametrize("codec", [None, "halving", "int8"])
def test_chunks_of_many_sizes_are_read_whole(codec):
    """A chunk that takes the slots of dropped ones lies in parts; a codec holds it as one blob."""
    int8 = QuantisingCodec(KVCodecSpec(SideSpec("int8", group_size=4), SideSpec("int8", group_size=4)))
    cache = KVCache(1, capacity_tokens=9 * S, codec={None: None, "halving": Halving(), "int8": int8}[codec])
    held: dict[int, torch.Tensor] = {}
    for at, frames in enumerate((1, 4, 4, 2, 1, 4, 3, 4)):
        while sum(k.shape[1] for k in held.values()) + frames * S > 9 * S:
            del held[oldest := min(held)]
            cache.evict([oldest])
        held[at], _ = committed(cache, frames)
        keys = torch.cat(list(held.values()), dim=1)
        read, _ = cache.readonly().layer(0).assemble(*(own := tokens(S)))
        scale, error = (0.5, 0.0) if codec == "halving" else (1.0, 0.05 if codec else 0.0)
        torch.testing.assert_close(read, torch.cat([scale * keys, own[0]], dim=1), rtol=0, atol=error)
    assert max(len(c.spans) for c in cache.chunks) > 1, "no chunk lay in parts: the sizes test nothing"


def test_snapshots_are_not_changed_by_later_steps():
    for options in ({}, {"codec": Halving()}, {"codec": Halving(), "hot_chunks": 1}):
        cache, *_ = filled(1, 2, **options)
        state, own = cache.state(), tokens(S)
        before = begun(cache.readonly(), 1).assemble(*own)[0].clone()
        cache.evict([0])
        committed(cache, 1)
        cache.load_state(state)
        assert torch.equal(begun(cache.readonly(), 1).assemble(*own)[0], before) and [c.id for c in cache.chunks] == [0, 1]


def test_reset_keeps_or_frees_buffers():
    cache, *_ = filled(2)
    buffers = cache.store.buffers[0]
    cache.reset(free_buffers=False)
    assert cache.num_tokens == 0 and cache.store.buffers[0] is buffers
    with pytest.raises(ValueError, match="another batch"):
        begun(cache.append(), 1).assemble(*tokens(S, batch=1))
    cache.reset()
    assert cache.store.buffers[0] is None and cache.num_bytes() == 0
    begun(cache.append(), 1).assemble(*tokens(S, batch=1))


class Halving(KVCodec):
    """A lossy codec that shows itself: decode(encode(x)) = x / 2."""

    def __init__(self):
        self.calls = []

    def encode(self, x, *, side, layer):
        self.calls.append((side, layer, x.shape[1]))
        return x.clone()

    def decode(self, blob, *, side):
        return blob / 2

    def decode_into(self, blob, out, *, side):
        out.copy_(blob / 2)


def test_codec_sees_chunks_and_its_result_is_what_is_read():
    codec = Halving()
    cache, k, _ = filled(1, 2, codec=codec)
    assert codec.calls == [("key", 0, S), ("value", 0, S), ("key", 0, 2 * S), ("value", 0, 2 * S)]
    k_all, _ = cache.readonly(1).layer(0).assemble(*(own := tokens(S)))
    assert torch.equal(k_all, torch.cat([k[:, :S] / 2, own[0]], dim=1))
    k_all, _ = begun(cache.append(), 1).assemble(*own)
    assert torch.equal(k_all, torch.cat([k, own[0]], dim=1) / 2), "in append a chunk attends to its coded self"
    assert torch.equal(cache.readonly().layer(0).assemble(*own)[0], torch.cat([k / 2, own[0]], dim=1))
    assert torch.equal(begun(cache.readonly(transient=True), 1).assemble(*own)[0], torch.cat([k / 2, own[0]], dim=1))


def test_hot_chunks_are_plain_until_they_grow_older():
    codec = Halving()
    cache, k, _ = filled(1, 1, 1, codec=codec, hot_chunks=2)
    assert codec.calls == [("key", 0, S), ("value", 0, S)], "only the oldest was coded"
    k_all, _ = begun(cache.append(), 1).assemble(*(own := tokens(S)))
    assert torch.equal(k_all, torch.cat([k[:, :S] / 2, k[:, S:], own[0]], dim=1))


@torch.no_grad()
def test_pre_rope_keys_can_be_renumbered():
    """Dropping the first frame and renumbering the rest is a video that starts a frame later;
    post-RoPE keys keep absolute positions.
    """
    net, structure = tiny_net(), {"grid": GRID, "pattern": pattern("c1-1")}
    x, t, cond = latents(3), frame_times(3), condition(net.config)
    # every frame attends to itself alone, so the contents of a frame's keys do not depend on the
    # frames before it
    alone = TokenLayout.context(2, window=1, **structure)
    cache = KVCache(net.config.num_layers, capacity_tokens=5 * S, keys="pre_rope")
    net(x[:, :, :2], t[:, :2], cond, alone, cache.append())
    current = TokenLayout.over_cache((1,), grid=GRID, context_tokens=S)

    fresh = KVCache(net.config.num_layers, capacity_tokens=5 * S, keys="pre_rope")
    first = TokenLayout.cached_chunk(0, num_frames=3, **structure)
    net(x[:, :, 1:2], t[:, 1:2], cond, first, fresh.append())
    expected = net(x[:, :, 2:], t[:, 2:], cond, current, fresh.readonly())

    def seen() -> torch.Tensor:
        return net(x[:, :, 2:], t[:, 2:], cond, current, cache.readonly())

    cache.evict([0])
    assert (seen() - expected).abs().max() > 1e-3, "its keys stand where they stood"
    kept = cache.chunks[0].id
    cache.place({kept: (0,)})
    torch.testing.assert_close(seen(), expected, rtol=0, atol=1e-12)
    # per sample and head
    cache.place({kept: Positions(GRID, tokens=at_frames((0,), GRID).per_token.expand(2, -1, 4, -1))})
    torch.testing.assert_close(seen(), expected, rtol=0, atol=1e-12)
    cache.place({kept: Positions(GRID, tokens=at_frames((3,), GRID).per_token)})
    assert (seen() - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2 temporal positions"):
        cache.place({kept: (0, 1)})
    with pytest.raises(ValueError, match=f"positions of 12 tokens for chunk {kept}, which holds 6"):
        cache.place({kept: at_frames((0, 1), GRID)})
