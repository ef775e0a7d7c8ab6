"""FP8 attention: the format, the formula against float64, kernels against the formula, what they
compile to, refusals.
"""

from __future__ import annotations

import math
import re
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from rcm.kernels.fp8_attention import api, codes
from rcm.kernels.fp8_attention.reference import attend_reference
from rcm.kernels.fp8_attention.schedule import PERSISTENT
from rcm.kernels.persistent_attention.schedule import Tiles
from tests.support.in_interpreter import in_interpreter

ROUNDING = 2.0**-4
"""Largest relative error of a value that is rounded to 3 bits."""


def drawn(*lengths: int, heads: int = 3, width: int = 32, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Tensors [B, L, N, D] with a part that all tokens of a head share, as keys and values have."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, n, heads, width, generator=draw) + 3 * torch.randn(heads, width, generator=draw) * (i > 0)
        for i, n in enumerate(lengths)
    )


def held_codes(k: Tensor, v: Tensor, slots: Tensor, *, capacity: int) -> codes.Codes:
    held = codes.new_codes(codes.scales_of(k, v), batch=k.shape[0], capacity=capacity)
    api.write(held, slots, k, v)
    return held


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * q.shape[3] ** -0.5).softmax(dim=-1) @ v).transpose(1, 2)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_codes_are_within_a_rounding_of_what_they_stand_for():
    k, v = drawn(0, 37, 37)[1:]
    slots = torch.cat([torch.arange(9, 37), torch.arange(0, 9)])
    held = held_codes(k, v, slots, capacity=37)
    order = slots.argsort()
    for found, x, center in zip(codes.decoded(held, 37), (k, v), (held.scales.key_center, held.scales.value_center), strict=True):
        x = x[:, order]
        least = (x - center).abs().amax() * codes.HEADROOM / codes.LARGEST * 2.0**-9
        assert ((found - x).abs() <= ROUNDING * 1.001 * (x - center).abs() + least).all()
    assert not codes.to_e4m3(torch.tensor([1e9, -1e9])).float().isnan().any(), "what lies beyond the headroom is cut off"


def test_rows_hold_every_token_of_a_group_once():
    rows = codes.rows_of(torch.arange(64))
    assert sorted(rows.tolist()) == list(range(64)) and torch.equal(rows[16:32], rows[:16] + 16)


@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
def test_the_formula_is_as_near_to_float64_as_three_bits_allow(strength):
    q, k, v = drawn(40, 300, 300)
    k = strength * k
    held = held_codes(k, v, torch.arange(300), capacity=300)
    queries = codes.code_queries_reference(q, held.scales, scale=32**-0.5)
    found = attend_reference(queries, held, count=300, dtype=torch.float64)
    # the same attention to what the codes stand for: what is left is the rounding of the weights
    # alone
    restored_q = queries.codes.double() * queries.scale.double()[..., None] / held.scales.key_scale.double()[:, None, None]
    restored_q = (restored_q / math.log2(math.e) * 32**0.5).transpose(1, 2)
    assert relative(found, exact(restored_q, *(x.double() for x in codes.decoded(held, 300)))) < ROUNDING / 4
    assert relative(found, exact(q, k, v)) < 1.2 * ROUNDING
    assert relative(found, exact(q, k, v)) > 1e-4, "it is FP8"


def test_what_all_keys_and_values_share_costs_nothing():
    """The centers: with them the error does not grow with the common part; without them it does."""
    q, k, v = drawn(40, 200, 200)
    errors = []
    for common in (0.0, 30.0):
        keys, values = k + common, v + common
        held = held_codes(keys, values, torch.arange(200), capacity=200)
        found = api.attend(q, held, count=200, scale=32**-0.5)
        errors.append(float((found - exact(q, keys, values)).norm()))
    assert errors[1] < 1.1 * errors[0]


def test_only_the_first_tokens_count_and_plain_keys_are_coded_alike():
    q, k, v = drawn(5, 70, 70)
    held = held_codes(k, v, torch.arange(70), capacity=80)
    found = api.attend(q, held, count=33, scale=0.2)
    api.write(held, torch.arange(33, 70), *(1e4 * x[:, 33:] for x in (k, v)))
    assert torch.equal(api.attend(q, held, count=33, scale=0.2), found)
    assert torch.equal(api.attend_plain(q, k[:, :33], v[:, :33], held.scales, scale=0.2), found)


def test_kernels_in_the_interpreter():
    report = in_interpreter("interpreted_fp8_attention", "errors")
    assert report["coding"] < 2e-3, "a byte in a thousand may round the other way: a quotient is not a product"
    assert report["attention"] < 0.01


@pytest.mark.slow
def test_broken_kernels_are_noticed():
    report = in_interpreter("interpreted_fp8_attention", "mutants")
    assert len(report) > 10 and {name: error for name, error in report.items() if error < 0.05} == {}


def test_obstacles_are_named():
    card, capability = torch.device("cuda", 0), "torch.cuda.get_device_capability"
    assert api.obstacle(torch.device("cpu"), width=16) is None
    assert "the device is mps" in api.obstacle(torch.device("mps"), width=128)
    with patch(capability, lambda *_: (8, 9)):
        assert "compute capability 9.0 (H100, H200), this card has 8.9" in api.obstacle(card, width=128)
    with patch(capability, lambda *_: (9, 0)):
        assert "heads of 128 channels, the network's have 64" in api.obstacle(card, width=64)
        assert api.obstacle(card, width=128) is None


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [PERSISTENT, Tiles(3, 64, 8)], ids=str)
def test_the_hopper_kernel_compiles_for_its_card(tmp_path, monkeypatch, tiles):
    pytest.importorskip("triton")
    from triton.compiler import CompiledKernel

    from rcm.kernels import precompile
    from rcm.kernels.fp8_attention import launch
    from rcm.kernels.persistent_attention import launch as persistent
    from tests.support.pretend_gpu import pretended

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[CompiledKernel] = []

    def plan() -> None:
        with torch.device("meta"):
            q, k, v = (torch.empty(1, n, 2, 128, dtype=torch.bfloat16) for n in (130, 129, 129))
            held = codes.new_codes(codes.scales_of(k, v), batch=1, capacity=144)
            launch.write(held, torch.empty(129, dtype=torch.int64), k, v)
            queries = launch.code_queries(q, held.scales, scale=0.1)
            launch.attend_hopper(queries, held, count=129, dtype=torch.bfloat16, tiles=tiles)

    with pretended(), patch.object(persistent, "processors", lambda _: 132), patch.object(CompiledKernel, "run", property(found.append)):
        precompile.precompile(plan, device="cuda", threads=2)
    kernel = next(kernel for kernel in found if kernel.name == "hopper_forward")
    assert kernel.metadata.shared <= 227 * 1024
    ptx = kernel.asm["ptx"]
    products = len(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3", ptx))
    # per consumer: S and P V of the loop, the first S and the last P V, 32 channels or keys at a
    # time
    assert products == tiles.consumers * 2 * (128 // 32 + tiles.block_n // 32) == ptx.count("wgmma.mma_async")
    assert len(re.findall(r"st\.shared|stmatrix", ptx)) <= 4 * tiles.consumers, "weights stay in registers"


@pytest.mark.slow
def test_the_plan_holds_what_streams_launch(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from rcm.kernels import precompile
    from rcm.kernels.fp8_attention.compile_list import attention_plan
    from rcm.kernels.persistent_attention import launch as persistent
    from tests.support.pretend_gpu import pretended

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pretended() as loaded, patch.object(persistent, "processors", lambda _: 132):
        done = precompile.precompile(attention_plan, device="cuda", threads=2)
    wanted = {"code_pair": 2, "code_queries": 1, "hopper_forward": 1, "merge_parts": 1, "portable_forward": 1}
    assert done.kernels == 6 and {name: loaded.count(name) for name in loaded} == wanted


@pytest.mark.gpu
@pytest.mark.parametrize(("q_len", "count", "batch"), [(1, 1, 2), (130, 129, 2), (1560, 4680, 1), (4680, 9000, 1)])
def test_the_kernels_on_a_card(q_len, count, batch):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != api.CAPABILITY:
        pytest.skip("needs a card of compute capability 9.0")
    q, k, v = (x.cuda().bfloat16() for x in drawn(q_len, count + 200, count + 200, width=128, batch=batch))
    held = held_codes(k, v, torch.arange(count + 200, device="cuda"), capacity=count + 200)
    truth = exact(q, k[:, :count], v[:, :count])
    queries = codes.code_queries_reference(q, held.scales, scale=128**-0.5)
    budget = relative(attend_reference(queries, held, count=count, dtype=torch.float64), truth)
    assert relative(api.attend(q, held, count=count, scale=128**-0.5), truth) <= 1.2 * budget + 4e-3
