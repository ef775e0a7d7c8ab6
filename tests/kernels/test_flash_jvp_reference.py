"""The eager reference against functorch and differences in float64; its contract and its
refusals.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.flash_jvp import flash_jvp, reference
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing
from tests.support import attention_oracle as oracle

MASKS = {
    "none": None,
    "causal": BlockCausal(BlockPattern(1, 2), 5, 3),
    "causal-offset-window-sink": BlockCausal(BlockPattern(1, 1), 5, 3, q_block_offset=3, window=2, sinks=1),
    "teacher": TeacherForcing(BlockPattern(1, 2), 5, 3),
    "teacher-noisy-window1-sink": TeacherForcing(BlockPattern(1, 1), 5, 3, queries="noisy", window=1, sinks=1),
}
TANGENTS = ["".join(names) for count in range(1, 4) for names in itertools.combinations("qkv", count)]


def case(mask_name: str, **options) -> tuple[dict, object]:
    mask = MASKS[mask_name]
    q_len, kv_len = (7, 13) if mask is None else (mask.q_len, mask.kv_len)
    return oracle.random_inputs(q_len=q_len, kv_len=kv_len, **options), mask


def assert_matches_float64(inputs: dict, mask, *, tol: float = 1e-12, **options) -> None:
    scale = options.get("scale") or inputs["q"].shape[-1] ** -0.5
    o, o_dot, lse = flash_jvp(**inputs, mask=mask, **options)
    truth = oracle.forward_mode(inputs, mask=mask, scale=scale)
    for name, got, expected in zip(("o", "o_dot", "lse"), (o, o_dot, lse), truth, strict=True):
        assert oracle.relative_error(got, expected) < tol, name


@pytest.mark.parametrize("tangents", TANGENTS)
@pytest.mark.parametrize("mask_name", MASKS)
def test_every_tangent_term_alone_and_together(mask_name, tangents):
    inputs, mask = case(mask_name, tangents=tangents, d_qk=5, d_v=3)
    assert_matches_float64(inputs, mask)


@pytest.mark.parametrize("mask_name", MASKS)
def test_against_central_differences(mask_name):
    inputs, mask = case(mask_name)
    _, o_dot, _ = flash_jvp(**inputs, mask=mask)
    truth = oracle.central_difference(inputs, mask=mask, scale=inputs["q"].shape[-1] ** -0.5)
    assert oracle.relative_error(o_dot, truth) < 1e-8


@pytest.mark.parametrize("mask_name", ["none", "teacher", "causal-offset-window-sink"])
@pytest.mark.parametrize("tangents", ["k", "v", "qkv"])
@pytest.mark.parametrize("tangent_start", [1, 9, 15])
def test_tangent_start_equals_explicit_zeros(mask_name, tangents, tangent_start):
    mask = MASKS[mask_name]
    start = min(tangent_start, 13) if mask is None else tangent_start
    inputs, mask = case(mask_name, tangents=tangents, tangent_start=start)
    explicit = flash_jvp(**inputs, mask=mask)
    for cut in (False, True):
        given = dict(inputs)
        for name in ("k_dot", "v_dot"):
            if given[name] is not None:
                given[name] = given[name][:, start:] if cut else given[name].index_fill(1, torch.arange(start), float("nan"))
        got = flash_jvp(**given, mask=mask, tangent_start=start)
        for a, b in zip(got, explicit, strict=True):
            if a is None:
                assert start == given["k"].shape[1] and "q" not in tangents and not b.any()
            else:
                assert oracle.relative_error(a, b) < 1e-13


def test_clean_half_of_teacher_forcing_has_zero_tangent():
    mask = MASKS["teacher"]
    inputs, _ = case("teacher", tangent_start=mask.half_len)
    inputs["q_dot"][:, : mask.half_len] = 0
    _, o_dot, _ = flash_jvp(**inputs, mask=mask, tangent_start=mask.half_len)
    assert not o_dot[:, : mask.half_len].any() and o_dot[:, mask.half_len :].abs().min() > 0


def test_no_tangents_give_none():
    inputs, mask = case("causal", tangents="")
    o, o_dot, lse = flash_jvp(**inputs, mask=mask)
    truth, _, lse_truth = oracle.forward_mode(inputs, mask=mask, scale=0.25)
    assert o_dot is None and oracle.relative_error(o, truth) < 1e-13 and oracle.relative_error(lse, lse_truth) < 1e-13


def test_explicit_scale_strides_and_small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "SCORES_PER_CHUNK", 2 * 2 * 15 * 2)
    inputs, mask = case("causal")
    strided = {name: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for name, t in inputs.items()}
    assert not strided["q"].is_contiguous()
    assert_matches_float64(strided, mask, scale=0.7)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_low_precision_inputs_are_computed_in_float32(dtype, tol):
    inputs, mask = case("teacher", dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, o_dot, lse = flash_jvp(**inputs, mask=mask)
    truth = oracle.forward_mode(inputs, mask=mask, scale=0.25)
    assert (o.dtype, o_dot.dtype, lse.dtype) == (dtype, dtype, torch.float32)
    for got, expected in zip((o, o_dot), truth[:2], strict=True):
        assert oracle.relative_error(got, expected) < tol / 2
    assert oracle.relative_error(lse, truth[2]) < 1e-6, "the log-sum-exp stays float32, also under autocast"


def refuse(error, words, **changes):
    inputs, _ = case("none")
    options = {key: changes.pop(key) for key in ("mask", "tangent_start", "implementation") if key in changes}
    inputs.update(changes)
    with pytest.raises(error, match=words):
        flash_jvp(**inputs, **options)


def test_refusals_name_the_argument():
    base, _ = case("none")
    refuse(ValueError, r"k must have shape \(2, 13, 2, 16\)", k=base["k"][..., :8])
    refuse(ValueError, "v must have shape", v=base["v"][:, :5])
    refuse(ValueError, "q_dot must have shape", q_dot=base["q_dot"][:, :3])
    refuse(ValueError, "k_dot must have shape.*or.*tangent_start=4", k_dot=base["k_dot"][:, :5], tangent_start=4)
    refuse(ValueError, "tangent_start must be in", tangent_start=14)
    refuse(ValueError, r"q must be \[B, L, N, D\]", q=base["q"][0])
    refuse(ValueError, "mask .* covers 7 queries x 12 keys", mask=Full(7, 12))
    refuse(ValueError, "non-empty", v=base["v"][..., :0], v_dot=None)
    refuse(TypeError, "k must have the dtype of q", k=base["k"].float())
    refuse(TypeError, "v_dot must be on the device", v_dot=base["v_dot"].to("meta"))
    refuse(TypeError, "got torch.int64", **{name: t.long() for name, t in base.items()})
    refuse(RuntimeError, "v requires grad", v=base["v"].clone().requires_grad_())
    refuse(ValueError, "implementation must be", implementation="fast")


def test_dual_tensors_are_refused():
    base, _ = case("none")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="k is a dual tensor"):
        flash_jvp(**{**base, "k": forward_ad.make_dual(base["k"], base["k_dot"])})


def test_requires_grad_is_fine_without_grad_mode():
    base, _ = case("none")
    with torch.no_grad():
        o, _, _ = flash_jvp(**{**base, "q": base["q"].clone().requires_grad_()})
    assert not o.requires_grad
