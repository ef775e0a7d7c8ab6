"""Masked attention with gradient on a real GPU: budgets of twice the eager error, full length,
reproducibility, what `auto` does.
"""

from __future__ import annotations

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.flash_jvp.budget import relative_error
from rcm.kernels.masked_attention import backward, budget, dense, masked_attention
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing
from rcm.nets.attention import AttentionCore, attention_record, resolve
from tests.support import mutants

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MASKS = {
    "full": Full(300, 515),
    "causal": BlockCausal(BlockPattern(1, 2), 7, 75),
    "offset": BlockCausal(BlockPattern(1, 1), 9, 61, q_block_offset=4, window=2, sinks=1),
    "forced": TeacherForcing(BlockPattern(1, 2), 7, 83),
    "forced window 1": TeacherForcing(BlockPattern(1, 2), 7, 83, window=1),
    "forced window 2 sinks": TeacherForcing(BlockPattern(3, 3), 9, 41, window=2, sinks=1),
    "noisy": TeacherForcing(BlockPattern(1, 2), 7, 83, queries="noisy"),
    "single tokens": TeacherForcing(BlockPattern(1, 1), 9, 1),
}


def draw(mask, *, width: int = 128, dtype=torch.bfloat16, batch: int = 2, heads: int = 3, seed: int = 0):
    """Inputs with a component that all tokens share, and a gradient of the result."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def one(length: int) -> torch.Tensor:
        x = torch.randn(batch, length, heads, width, generator=generator, device="cuda")
        return (x + 0.5 * torch.randn(1, 1, 1, width, generator=generator, device="cuda")).to(dtype)

    return (one(mask.q_len), one(mask.kv_len), one(mask.kv_len)), one(mask.q_len)


def fused(mask, name: str = "cudnn"):
    return lambda q, k, v: masked_attention(q, k, v, mask=mask, forward="triton", backward=name)


def violations(mask, attend, *, width: int = 128, dtype=torch.bfloat16) -> dict[str, tuple[float, float]]:
    inputs, grad_o = draw(mask, width=width, dtype=dtype)
    report = budget.errors_and_budgets(attend, inputs, grad_o, mask=mask, scale=width**-0.5)
    return {name: pair for name, pair in report.items() if not pair[0] <= pair[1]}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """A gradient that no rectangle writes stays NaN and fails the budget."""
    allocate = backward._allocate
    monkeypatch.setattr(backward, "_allocate", lambda *about: allocate(*about).fill_(float("nan")))


@pytest.mark.parametrize("name", ["cudnn", "flash", "flash4", "eager"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_against_float64(mask, name):
    if name == "flash4" and not dense._has_flash4():
        pytest.skip("needs FlashAttention-4: pip install --pre 'flash-attn-4[cu13]'")
    if (mask, name) == ("single tokens", "cudnn"):
        pytest.skip("cuDNN takes no rectangle of one key: test_rectangles_of_one_key")
    assert not violations(MASKS[mask], fused(MASKS[mask], name))


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 64, 80, 256])
def test_head_sizes_and_dtypes(width, dtype, name):
    mask = MASKS["forced"]
    assert not violations(mask, fused(mask, name), width=width, dtype=dtype)


@pytest.mark.parametrize("choice", ["auto", "triton", "sdpa", "cudnn", "flex", "flex_triton"])
@pytest.mark.parametrize("mask", ["forced window 2 sinks", "offset"])
def test_back_ends_by_name(mask, choice):
    backend = resolve(choice)
    assert not violations(MASKS[mask], lambda q, k, v: backend(q, k, v, mask=MASKS[mask], scale=128**-0.5))


def test_strides_and_plans_cached_by_them():
    """cuDNN's plans are cached by the strides of q, k and v alone: results must not depend on what
    ran before.
    """
    mask = MASKS["forced"]
    (q, k, v), grad_o = draw(mask)
    expected = budget.with_gradients(fused(mask), (q, k, v), grad_o)
    longer = TeacherForcing(BlockPattern(1, 2), 9, 83)
    packed = torch.stack([torch.cat([x, x], dim=1)[:, : longer.q_len] for x in (q, k, v)], dim=2)
    budget.with_gradients(fused(longer), tuple(packed.unbind(2)), torch.cat([grad_o, grad_o], dim=1)[:, : longer.q_len])
    views = tuple(x[:, : mask.q_len] for x in packed.unbind(2))
    heads_first = grad_o.transpose(1, 2).contiguous().transpose(1, 2)
    for inputs, grad in ((views, grad_o), (views, heads_first), ((q, k, v), heads_first)):
        for mine, exact in zip(budget.with_gradients(fused(mask), inputs, grad), expected, strict=True):
            assert relative_error(mine, exact) < 1e-3


def test_full_length_agrees_with_dense_calls_per_segment():
    """The size of training, where float64 truth is out of reach; `auto` takes the fused path and
    the record says so.
    """
    mask = TeacherForcing(BlockPattern(3, 3), 21, 1560)
    inputs, grad_o = draw(mask, batch=1, heads=2)
    core = AttentionCore(resolve("auto"))
    got = budget.with_gradients(lambda q, k, v: core(q, k, v, mask), inputs, grad_o)
    expected = budget.with_gradients(lambda q, k, v: resolve("cudnn")(q, k, v, mask=mask, scale=128**-0.5), inputs, grad_o)
    for mine, other in zip(got, expected, strict=True):
        assert relative_error(mine, other) < 6e-3
    with torch.no_grad():
        assert torch.equal(core(*inputs, mask), got[0])
    if torch.cuda.get_device_capability() == (9, 0):
        assert attention_record(core)["calls"] == {"dense": "sdpa", "masked with gradient": "triton + cudnn", "masked": "triton"}


def test_reproducible_when_asked():
    mask = TeacherForcing(BlockPattern(3, 3), 21, 300)
    inputs, grad_o = draw(mask, batch=1, heads=12)
    backend = resolve("auto")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [budget.with_gradients(lambda q, k, v: backend(q, k, v, mask=mask, scale=0.1), inputs, grad_o) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_first_steps_cost_seconds():
    import time

    mask = TeacherForcing(BlockPattern(2, 3), 20, 111)
    inputs, grad_o = draw(mask, batch=1)
    began = time.perf_counter()
    budget.with_gradients(fused(mask), inputs, grad_o)
    torch.cuda.synchronize()
    assert time.perf_counter() - began < 10


MUTANTS = {
    # strides stay those of o: with others cuDNN's backward reads outside of it, and takes the
    # process along
    "o of the rectangle's first rows": ("rows.cut(o[b]), row_lse", "rows.cut(o[b].roll(1, 0)), row_lse"),
    "lse in base 2": ("row_lse = rows.cut(lse[b], dim=1).contiguous()", "row_lse = (1.4427 * rows.cut(lse[b], dim=1)).contiguous()"),
    "a call is left out": ("enumerate(zip(queries, keys, strict=True))", "enumerate(zip(queries[:-1], keys[:-1], strict=True))"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_backward_passes_are_noticed(name, tmp_path, monkeypatch):
    from rcm.kernels.masked_attention import api

    broken = mutants.load(backward, old=MUTANTS[name][0], new=MUTANTS[name][1], folder=tmp_path)
    monkeypatch.setattr(api, "masked_backward", broken.masked_backward)
    assert violations(MASKS["forced"], fused(MASKS["forced"]))


def test_every_fused_rectangle_is_known_to_apply_here():
    (q, _, v), _ = draw(MASKS["full"])
    assert [dense.rectangle_obstacle(name, q, v, mask=MASKS["full"]) for name in ("cudnn", "flash", "eager")] == [None, None, None]
    assert "multiples of 8" in dense.rectangle_obstacle("cudnn", q[..., :12], v, mask=MASKS["full"])


def test_rectangles_of_one_key():
    mask = MASKS["single tokens"]
    with pytest.raises(ConfigError, match="at least two keys per rectangle"):
        violations(mask, fused(mask, "cudnn"))
    assert not violations(mask, lambda q, k, v: resolve("triton")(q, k, v, mask=mask, scale=128**-0.5)), "flash takes over"
