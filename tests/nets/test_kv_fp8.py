"""A cache with FP8 codes beside it: they follow writes, moves and snapshots; what passes may
attend; refusals.
"""

from __future__ import annotations

import pytest
import torch

from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.fp8_attention.codes import decoded, rows_of
from rcm.kernels.masks import BlockCausal
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_fp8 import Fp8Store
from rcm.nets.kv_store import DenseStore, Seen

LAYERS, CAPACITY = 2, 24


def drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, count, 3, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    return k, v


def written(*, turned: bool = True) -> Fp8Store:
    """Every layer with 20 tokens in two spans."""
    store = Fp8Store(LAYERS, CAPACITY, turned=turned)
    for layer in range(LAYERS):
        store.put(layer, 0, ((4, 12), (12, 24)), drawn(20, layer))
    return store


def codes_stand_for_what_is_held(store: Fp8Store) -> bool:
    """Slots that were written, within the rounding of e4m3."""
    good = True
    for layer, codes in enumerate(store.codes):
        for found, x in zip(decoded(codes, CAPACITY), store.allocated(layer), strict=True):
            used = x.abs().sum(dim=(0, 2, 3)) > 0
            good &= bool((found[:, used] - x[:, used].float()).abs().max() < 0.3)
            good &= float((found[:, used] - x[:, used].float()).norm() / x.norm()) < 0.04
    return good


def test_codes_follow_writes_and_moves():
    store = written()
    assert codes_stand_for_what_is_held(store) and store.ready and not store.unset
    store.put(0, 0, ((0, 4), (12, 14)), drawn(6, 9))
    store.move(((12, 16),), ((0, 4),))
    assert codes_stand_for_what_is_held(store)
    assert store.num_bytes() > 1.1 * sum(x.nbytes for pair in store.buffers for x in pair)


def bits(store: Fp8Store) -> list[torch.Tensor]:
    """Codes of the slots that `written` fills, and scales, as copies."""
    rows = rows_of(torch.arange(4, CAPACITY))
    parts = ((c.keys.view(torch.uint8)[:, :, rows], c.values.view(torch.uint8)[..., 4:CAPACITY], *c.scales) for c in store.codes)
    return [x.clone() for part in parts for x in part]


def test_a_state_restores_codes_and_scales_bit_by_bit():
    store = written()
    state, before = store.state(), bits(store)
    other = Fp8Store(LAYERS, CAPACITY, turned=True)
    store.put(0, 0, ((0, 20),), tuple(5 * x for x in drawn(20, 3)))
    store.clear(free_buffers=False)
    store.put(1, 0, ((0, 20),), tuple(5 * x for x in drawn(20, 4)))
    assert not all(torch.equal(a, b) for a, b in zip(bits(store), before, strict=True))
    for target in (store, other):
        target.load_state(state)
        assert not target.unset and all(torch.equal(a, b) for a, b in zip(bits(target), before, strict=True))


def test_scales_are_those_of_the_first_tokens_after_a_clear_in_the_same_memory():
    store = written()
    places = [x.data_ptr() for codes in store.codes for x in (*codes.scales, codes.keys)]
    store.clear(free_buffers=False)
    assert store.unset and store.ready
    store.put(0, 0, ((0, 20),), tuple(7 * x for x in drawn(20, 3)))
    assert store.unset, "the other layer has none yet"
    store.put(1, 0, ((0, 20),), drawn(20, 1))
    fresh = Fp8Store(LAYERS, CAPACITY, turned=True)
    fresh.put(0, 0, ((0, 20),), tuple(7 * x for x in drawn(20, 3)))
    assert not store.unset and all(torch.equal(a, b) for a, b in zip(store.codes[0].scales, fresh.codes[0].scales, strict=True))
    assert places == [x.data_ptr() for codes in store.codes for x in (*codes.scales, codes.keys)]
    store.clear(free_buffers=True)
    assert store.codes == [None, None] and store.num_bytes() == 0


@pytest.mark.parametrize("turned", [True, False])
def test_attention_is_that_of_what_is_held(turned):
    store = written(turned=turned)
    q, _ = drawn(7, 8)
    k, v = (x[:, :20] for x in store.allocated(0))
    found = store.attend(0, q, (k, v), Seen(run=20), mask=None)
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / 4
    expected = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.08
    assert (store.codes[0] is not None) == turned


def test_gradients_tangents_and_masks_are_refused():
    store = written()
    q, _ = drawn(7, 8)
    k, v = (x[:, :20] for x in store.allocated(0))
    with pytest.raises(RuntimeError, match="neither gradients nor tangents; use attention='net'"):
        store.attend(0, q.requires_grad_(), (k, v), Seen(run=20), mask=None)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="neither gradients nor tangents"):
        store.attend(0, q.detach(), (k, v), Seen(run=20), mask=None)
    mask = BlockCausal(BlockPattern(1, 1), 4, 5)
    with pytest.raises(RuntimeError, match="every query see every key, this pass has BlockCausal"):
        store.attend(0, q.detach(), (k, v), Seen(run=20), mask=mask)


def test_a_cache_is_asked_by_name():
    make = {"num_layers": 1, "capacity_tokens": 8}
    assert type(KVCache(**make).store) is DenseStore
    assert KVCache(**make, attention="fp8").store.turned
    assert not KVCache(**make, attention="fp8", keys="pre_rope").store.turned
    with pytest.raises(ValueError, match="attention must be 'net' or, without a codec, 'fp8', got 'fp4'"):
        KVCache(**make, attention="fp4")
