"""Searched scales against a search in float64, group by group; what they recover of the error of
attention on keys of a trained network and on random ones.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.fitting import fitted
from rcm.kernels.kv_codec.formats import E2M1, TOP, CodeFormat
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from scripts.bench_kv_bias import SHIPPED, keys_of_a_stream, random_keys, row_of

KINDS = [("int2", False), ("int2", True), ("int4", False), ("int4", True), ("fp4", False)]
LEVELS = {
    ("int2", False): [-1.5, -0.5, 0.5, 1.5],
    ("int2", True): [0.0, 1.0, 2.0, 3.0],
    ("int4", False): [float(i) for i in range(-8, 8)],
    ("int4", True): [float(i) for i in range(16)],
    ("fp4", False): [sign * x for sign in (1.0, -1.0) for x in E2M1],
}


def groups(*, asymmetric: bool = False) -> Tensor:
    """Normal and heavy-tailed groups [1, 12, 24, 3] of very different size, one of them constant;
    asymmetric ones off zero. Elements lie on the grid, 400 steps to the largest.
    """
    x = torch.randn(1, 12, 24, 3, generator=torch.Generator().manual_seed(0))
    x[:, 3:6] = x[:, 3:6].pow(3)
    x[:, 11] = 1.0
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    half = ((high - low) / 2).clamp(min=1e-3) if asymmetric else x.abs().amax(2, keepdim=True)
    x = (400 * (x - (low + high) / 2 * asymmetric) / half).round() + 700 * asymmetric
    x[:, 9:11] *= 2.0**-20
    return x


def weighted(x: Tensor) -> Tensor:
    """What elements of a group [g] weigh, which spans -1..1 about 0."""
    return 2 * x.abs() + x.abs().max()


def candidates(x: Tensor, dtype: str, *, asymmetric: bool) -> list[tuple[float, float, float, Tensor]]:
    """(weighted squared error, scale, zero, codes) of every step tried for a group [g]."""
    low, high = x.min(), x.max()
    mid = (low + high) / 2 if asymmetric else torch.zeros(())
    half = high - mid if asymmetric else x.abs().max()
    levels = torch.tensor(LEVELS[dtype, asymmetric], dtype=torch.float64)
    weight, found = weighted(x - mid), []
    for fraction in (1.0, 0.85, 0.7, 0.55):
        step = fraction * half / ((levels.max() - levels.min()) / 2 if asymmetric else TOP[dtype])
        wanted = (x - mid) / step + (levels.mean() if asymmetric else 0)
        code = levels[(wanted[:, None] - levels).abs().argmin(1)]
        design = torch.stack([code, torch.ones_like(code)], 1)[:, : 2 if asymmetric else 1]
        root = weight.sqrt()[:, None]
        solved = torch.linalg.lstsq(root * design, root[:, 0] * (x - mid)).solution
        scale, zero = float(solved[0]), float(solved[1]) if asymmetric else 0.0
        error = float((weight * (x - mid - scale * code - zero).square()).sum())
        found.append((error, scale, zero + float(mid), code))
    return found


@pytest.mark.parametrize(("dtype", "asymmetric"), KINDS)
def test_the_scale_is_that_of_the_best_step(dtype, asymmetric):
    """No step explains more, no other scale or zero fits its codes better."""
    x = groups(asymmetric=asymmetric)
    scales, zeros = fitted(x, x.shape[1] * x.shape[2], CodeFormat(dtype, x.shape[2], "channel", asymmetric, "rcm", fit=True))
    for at, channel in ((i, c) for i in range(11) for c in range(3)):
        group = x[0, at, :, channel].double()
        tried = candidates(group, dtype, asymmetric=asymmetric)
        best = min(error for error, *_ in tried)
        scale, zero = float(scales[0, at, channel]), float(zeros[0, at, channel])
        near = [entry for entry in tried if abs(entry[1] / scale - 1) < 1e-5 and entry[0] <= (1 + 1e-9) * best]
        assert near and abs(near[0][2] - zero) < 1e-4 * scale
        codes, mid = near[0][3], (group.min() + group.max()) / 2 if asymmetric else 0.0
        weight = weighted(group - mid)

        def error(scale: float, zero: float, codes=codes, weight=weight, group=group) -> float:
            return float((weight * (group - zero - scale * codes).square()).sum())

        for factor in (0.999, 1.001):
            assert error(factor * scale, zero) > error(scale, zero)
        for shift in (-1e-3, 1e-3) if asymmetric else ():
            assert error(scale, zero + shift * scale) > error(scale, zero)


@pytest.mark.parametrize(("dtype", "asymmetric"), KINDS)
def test_scales_count_in_the_size_of_their_group(dtype, asymmetric):
    """Powers of two change no code; padding counts for nothing; groups of one value restore it."""
    x, fmt = groups(asymmetric=asymmetric), CodeFormat(dtype, 24, "channel", asymmetric, "rcm", fit=True)
    once, again = fitted(x, 288, fmt), fitted(x * 2.0**-6, 288, fmt)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a[:, :11] * 2.0**-6, b[:, :11])
    own = x[:, :1, :20]
    padded = torch.cat([own, own[:, :, :1].expand(-1, -1, 4, -1)], dim=2)
    assert torch.equal(fitted(padded, 20, fmt)[0], fitted(own, 20, fmt)[0])
    assert not torch.equal(fitted(padded, 24, fmt)[0], fitted(own, 20, fmt)[0])
    for value in (0.0, 3.0):
        constant = torch.full((1, 24, 1, 2), value)
        restored = coding.decode(coding.encode(constant, fmt))
        torch.testing.assert_close(restored, constant, rtol=2.0**-4, atol=2.0**-20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("dtype", "asymmetric"), KINDS)
def test_what_is_not_finite_stays_so(dtype, asymmetric, bad):
    """A stream that overflowed is told so by what its cache restores."""
    x, fmt = torch.ones(2, 24, 1, 2), CodeFormat(dtype, 8, "channel", asymmetric, "rcm", fit=True)
    x[0, 3, 0, 1] = bad
    restored = coding.decode(coding.encode(x, fmt))
    assert not restored[0, :8, 0, 1].isfinite().any()
    assert restored[1].isfinite().all()


def test_what_is_stored_keeps_its_form_and_its_bytes():
    """So restoring, captured passes and snapshots know nothing of the search."""
    x = torch.randn(1, 70, 2, 64, generator=torch.Generator().manual_seed(1))
    for dtype, asymmetric in KINDS:
        side = SideSpec(dtype, asymmetric=asymmetric)
        plain, found = (KVCodec(KVCodecSpec(how, how)).encode(x, side="key", layer=0) for how in (side, replace(side, scale_fit="search")))
        assert [None if f is None else (f.shape, f.dtype) for f in found.fields] == [
            None if f is None else (f.shape, f.dtype) for f in plain.fields
        ]
        hats = [KVCodec(KVCodecSpec(side, side)).decode(blob, side="key") for blob in (plain, found)]
        errors = [float((hat - x).square().sum()) for hat in hats]
        assert errors[1] < (0.6 if dtype == "int2" else 0.97) * errors[0]
    assert "scales by search" in KVCodecSpec(SideSpec("int2", scale_fit="search")).describe()


def test_half_of_the_error_of_two_bits_is_recovered():
    """And the keys' bias, of which scales from the largest element leave a good part."""
    for seen in (keys_of_a_stream(SHIPPED, frames=9, batch=4), random_keys()):
        for values in (SideSpec("int2"), SideSpec()):
            row = row_of(seen, KVCodecSpec(SideSpec("int2"), values))
            assert row["recovered"] >= 0.5
            assert abs(row["then gain"]) < 0.2 * row["gain"]
            assert row["searched"] < 0.75 * row["corrected"]
