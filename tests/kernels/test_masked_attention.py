"""Masked attention with gradient on the CPU: the sum over rectangles against float64 autograd
through one dense softmax.
"""

from __future__ import annotations

import sys
import types
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels import replay
from rcm.kernels.flash_jvp.reference import reference_jvp
from rcm.kernels.flash_jvp.validation import Problem
from rcm.kernels.masked_attention import backward, budget, dense, masked_attention
from rcm.kernels.masked_attention.rectangles import combs
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing
from tests.support import mutants
from tests.support.attention_oracle import dense_attention, random_inputs, relative_error

REACH = [(None, 0), (1, 0), (1, 1), (2, 1), (3, 2)]
MASKS = {
    f"{kind} {first}-{chunk} window {window} sinks {sinks}": make(BlockPattern(first, chunk), frames, window=window, sinks=sinks)
    for kind, make in {
        "causal": lambda pattern, frames, **reach: BlockCausal(pattern, frames, 3, **reach),
        "offset": lambda pattern, frames, **reach: BlockCausal(pattern, frames, 3, q_block_offset=2, **reach),
        "forced": lambda pattern, frames, **reach: TeacherForcing(pattern, frames, 3, **reach),
        "noisy": lambda pattern, frames, **reach: TeacherForcing(pattern, frames, 3, queries="noisy", **reach),
    }.items()
    for first, chunk, frames in ((1, 1, 7), (3, 2, 9), (1, 4, 9))
    for window, sinks in REACH
} | {"full": Full(11, 13), "none": None}
FORCED = MASKS["forced 3-2 window 2 sinks 1"]


def problem(mask, *, dtype=torch.float64, d_v: int = 6, batch: int = 2):
    q_len, kv_len = (11, 13) if mask is None else (mask.q_len, mask.kv_len)
    drawn = random_inputs(q_len=q_len, kv_len=kv_len, d_qk=8, d_v=d_v, batch=batch, dtype=dtype, tangents="")
    grad_o = torch.randn(batch, q_len, 2, d_v, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return tuple(drawn[name] for name in "qkv"), grad_o


def ours(q, k, v, *, mask, scale=0.4):
    return masked_attention(q, k, v, mask=mask, scale=scale, forward="reference", backward="eager")


def worst_error(mask, attend=ours) -> float:
    """Largest relative error of o, dq, dk, dv against float64 autograd."""
    inputs, grad_o = problem(mask)
    truth = budget.with_gradients(lambda q, k, v: dense_attention(q, k, v, mask=mask, scale=0.4)[0], inputs, grad_o)
    got = budget.with_gradients(lambda q, k, v: attend(q, k, v, mask=mask), inputs, grad_o)
    return max(relative_error(mine, exact) for mine, exact in zip(got, truth, strict=True))


@pytest.mark.parametrize("name", MASKS)
def test_value_and_gradients_against_float64_autograd(name):
    assert worst_error(MASKS[name]) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_within_twice_the_error_of_eager_code(dtype):
    inputs, grad_o = problem(FORCED, dtype=dtype)
    report = budget.errors_and_budgets(lambda q, k, v: ours(q, k, v, mask=FORCED), inputs, grad_o, mask=FORCED, scale=0.4)
    assert set(report) == {"o", "dq", "dk", "dv"}
    assert all(error <= limit for error, limit in report.values()), report


def test_any_strides_and_contiguous_results():
    (q, k, v), grad_o = problem(FORCED, d_v=8)
    expected = budget.with_gradients(lambda q, k, v: ours(q, k, v, mask=FORCED), (q, k, v), grad_o)
    fused = torch.stack([q, k, v], dim=3)
    views = tuple(fused[:, :, :, i] for i in range(3))
    heads_first = grad_o.transpose(1, 2).contiguous().transpose(1, 2)
    got = budget.with_gradients(lambda q, k, v: ours(q, k, v, mask=FORCED), views, heads_first)
    for mine, exact in zip(got, expected, strict=True):
        assert torch.equal(mine, exact)
        assert mine.is_contiguous()


def test_saved_state_is_linear_in_length():
    mask = TeacherForcing(BlockPattern(1, 1), 16, 8)
    (q, k, v), _ = problem(mask, batch=1)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ours(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), mask=mask)
    assert len(saved) == 5
    assert max(x.numel() for x in saved) <= mask.kv_len * 2 * 8


def test_only_the_wanted_gradients():
    (q, k, v), grad_o = problem(FORCED)
    (dk,) = torch.autograd.grad(ours(q, k.requires_grad_(), v, mask=FORCED), (k,), grad_o)
    expected = budget.with_gradients(lambda q, k, v: ours(q, k, v, mask=FORCED), (q, k.detach(), v), grad_o)[2]
    assert torch.equal(dk, expected)
    with torch.no_grad():
        assert not ours(q, k, v, mask=FORCED).requires_grad


def test_recomputation_gives_the_same_gradients():
    (q, k, v), grad_o = problem(FORCED)
    expected = budget.with_gradients(lambda q, k, v: ours(q, k, v, mask=FORCED), (q, k, v), grad_o)
    got = budget.with_gradients(
        lambda q, k, v: checkpoint(lambda *x: ours(*x, mask=FORCED), q, k, v, use_reentrant=False, preserve_rng_state=False),
        (q, k, v),
        grad_o,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compilers_see_one_opaque_call():
    (q, k, v), grad_o = problem(FORCED)

    def surrounded(q, k, v):
        return 2 * ours(q + 1, k, v, mask=FORCED)

    graphs: list[torch.fx.GraphModule] = []

    def keep(module, _inputs):
        graphs.append(module)
        return module.forward

    expected = budget.with_gradients(surrounded, (q, k, v), grad_o)
    got = budget.with_gradients(torch.compile(surrounded, backend=keep), (q, k, v), grad_o)
    torch.testing.assert_close(got, expected)
    assert len(graphs) == 2 and all(len(graph.graph.nodes) < 8 for graph in graphs), "the call itself must not be traced"


def test_flash_attention_4_is_handed_the_rectangles(monkeypatch):
    """A stand-in with the signature of 4.0.0b36, which takes rows whose log-sum-exp lies dense."""
    dense_calls = []

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False):
        assert lse.is_contiguous() and not causal and all(x.stride(-1) == 1 for x in (q, k, v, out, dout))
        dense_calls.append((q.shape[:2], k.shape[1]))
        return dense.eager_rectangle(dout, q, k, v, out, lse, scale=softmax_scale)

    package = {name: types.ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")}
    package["flash_attn.cute.interface"]._flash_attn_bwd = _flash_attn_bwd
    for name, module in package.items():
        monkeypatch.setitem(sys.modules, name, module)
    (q, k, v), grad_o = problem(FORCED)
    o, lse = reference_jvp(Problem(q, k, v, None, None, None, FORCED, 0.4, tangent_start=0))[::2]
    how = {"mask": FORCED, "scale": 0.4}
    got = backward.masked_backward(grad_o, q, k, v, o, lse, rectangle=dense.RECTANGLES["flash4"], **how)
    wanted = backward.masked_backward(grad_o, q, k, v, o, lse, rectangle=dense.RECTANGLES["eager"], **how)
    assert len(dense_calls) == 2 * len(combs(FORCED)) and all(map(torch.equal, got, wanted))


def test_what_it_refuses():
    (q, k, v), grad_o = problem(FORCED)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with pytest.raises(ConfigError, match="unknown forward 'fast'.*triton, reference"):
        masked_attention(q, k, v, mask=FORCED, forward="fast", backward="eager")
    with pytest.raises(ConfigError, match="unknown backward 'fast'.*cudnn, flash, flash4, eager"):
        masked_attention(q, k, v, mask=FORCED, forward="reference", backward="fast")
    with pytest.raises(
        ConfigError, match="backward='cudnn' of masked attention does not apply: it needs a CUDA device, the inputs are on cpu"
    ):
        masked_attention(q, k, v, mask=FORCED, forward="reference", backward="cudnn")
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        masked_attention(*(torch.zeros(1, 5, 1, 16) for _ in range(3)), mask=None, forward="triton", backward="eager")
    with pytest.raises(ValueError, match="covers 54 queries x 54 keys, but q has 53 tokens"):
        ours(q[:, 1:], k, v, mask=FORCED)
    (dq,) = torch.autograd.grad(ours(q, k, v, mask=FORCED), (q,), grad_o.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaves[0].detach(), torch.ones_like(q))
        with pytest.raises(RuntimeError, match="q is a dual tensor"), torch.no_grad():
            ours(dual, k, v, mask=FORCED)
        with pytest.raises(RuntimeError, match="q is a dual tensor"):
            ours(dual, k, v, mask=FORCED)


DENSE_MUTANTS = {
    "delta forgotten": ("delta = (grad_o * o).sum(dim=-1, keepdim=True)", "delta = 0 * (grad_o * o).sum(dim=-1, keepdim=True)"),
    "delta of the rectangle instead of the row": ("delta = (grad_o * o)", "delta = (grad_o * (scale * (q @ k.mT)).softmax(-1) @ v)"),
    "normalised over the rectangle": (" - lse[rows][..., None]).exp()", ").softmax(dim=-1)"),
    "scale forgotten in dS": ("ds = scale * p *", "ds = p *"),
    "dV from dS": ("dv += p.mT @ grad_o[rows]", "dv += ds.mT @ grad_o[rows]"),
}
SUM_MUTANTS = {
    "results replace instead of add": ("add = move.add or self.plan.clear", "add = False"),
    "last call dropped": ("enumerate(zip(queries, keys, strict=True))", "enumerate(zip(queries[:-1], keys[:-1], strict=True))"),
    "first range of a comb only": ("return Teeth(self.start + first * self.step, self", "return Teeth(self.start, self"),
    "untouched keys stay as allocated": ("mixed, moves = bool((touched == 0).any()), []", "mixed, moves = False, []"),
    "lse of other rows": ("row_lse = rows.cut(lse[b], dim=1)", "row_lse = columns.cut(lse[b], dim=1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DENSE_MUTANTS, *SUM_MUTANTS])
def test_broken_backward_passes_are_noticed(name, tmp_path, monkeypatch):
    from rcm.kernels.masked_attention import api

    if name in DENSE_MUTANTS:
        broken = mutants.load(dense, old=DENSE_MUTANTS[name][0], new=DENSE_MUTANTS[name][1], folder=tmp_path)
        monkeypatch.setitem(dense.RECTANGLES, "eager", broken.eager_rectangle)
    else:
        broken = mutants.load(backward, old=SUM_MUTANTS[name][0], new=SUM_MUTANTS[name][1], folder=tmp_path)
        monkeypatch.setattr(api, "masked_backward", broken.masked_backward)
    module = backward if name in DENSE_MUTANTS else broken
    allocate = module._allocate
    monkeypatch.setattr(module, "_allocate", lambda *about: allocate(*about).fill_(float("nan")))
    masks = [MASKS["forced 1-1 window None sinks 0"], FORCED, MASKS["noisy 1-1 window 1 sinks 0"]]

    def error(mask) -> float:
        try:
            return worst_error(mask)
        except (RuntimeError, UnboundLocalError):
            return float("inf")  # a mutant whose shapes no longer fit is noticed as well

    assert max(error(mask) for mask in masks) > 1e-3


@pytest.mark.parametrize(("keep", "times"), [(True, 1), (False, 2)], ids=["kept", "run again"])
def test_recomputation_can_keep_the_forward(keep, times, monkeypatch):
    from rcm.kernels.masked_attention import api

    (q, k, v), grad_o = problem(FORCED)
    expected = budget.with_gradients(lambda q, k, v: ours(q, k, v, mask=FORCED), (q, k, v), grad_o)
    runs: list[int] = []
    original = api.reference_jvp
    monkeypatch.setattr(api, "reference_jvp", lambda problem: runs.append(1) or original(problem))
    tape = replay.Tape()

    def block(*x):
        with replay.keeping() if keep else nullcontext():
            return ours(*x, mask=FORCED)

    def attend(*x):
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": lambda: (tape.recording(), tape.replaying())}
        return checkpoint(block, *x, **options)

    got = budget.with_gradients(attend, (q, k, v), grad_o)
    assert len(runs) == times
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
