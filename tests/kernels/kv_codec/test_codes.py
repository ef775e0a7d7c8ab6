"""Codes against loops over single numbers in Python, one rule at a time; packing; scales as
stored.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from rcm.kernels.kv_codec import codes as coding
from rcm.kernels.kv_codec.formats import TOP, CodeFormat

E4M3 = torch.float8_e4m3fn
TABLE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
F = np.float32


def axes(x: Tensor, granularity: str) -> Tensor:
    """[B, S, N, D] with the quantised axis last, the others flattened before it."""
    b, s, n, d = x.shape
    return {
        "token": x.reshape(b * s * n, d),
        "channel": x.permute(0, 2, 3, 1).reshape(b * n * d, s),
        "head": x.permute(0, 2, 1, 3).reshape(b * n, s * d),
        "tensor": x.reshape(b, s * n * d),
    }[granularity]


def e4m3(number: float) -> float:
    """Rounded, at most 448: what torch makes of more depends on its version."""
    return float(torch.tensor(number).clamp(-448, 448).to(E4M3))


def by_hand(group: list[float], dtype: str, mode: str, unit: float) -> list[float]:
    """One symmetric group, number by number: what is decoded."""
    x = np.array(group, F)
    top = F({"int8": 127, "int4": 7, "int2": 1 if mode == "official" else 1.5, "fp8": 448, "fp4": 6}[dtype])
    if mode == "official":
        divide = stored = e4m3(max(F(1e-10), np.abs(x).max() / top))
    else:
        divide = max(F(1e-8), np.abs(x).max()) / top
        if mode == "release":
            stored = e4m3(divide)
        elif dtype in ("int8", "fp8"):
            divide = stored = float(torch.tensor(divide).to(torch.float16))
        else:
            divide = stored = max(2.0**-9, e4m3(divide / F(unit))) * unit
    found = []
    for y in x / F(divide) if divide else np.zeros_like(x):
        if dtype == "fp8":
            number = e4m3(float(y))
        elif dtype == "fp4":
            number = TABLE[int(np.argmin([abs(y - F(t)) for t in TABLE]))]
        elif mode == "official":
            number = max(-float(top), min(float(top), np.copysign(np.floor(abs(float(y)) + 0.5), y)))
        elif dtype == "int2":
            number = (-1.5, -0.5, 0.5, 1.5)[int(np.argmin([abs(y - F(t)) for t in (-1.5, -0.5, 0.5, 1.5)]))]
        else:
            number = float(np.clip(np.round(y), -float(top) - 1, float(top)))
        found.append(float(F(number) * F(stored)))
    return found


def expected(x: Tensor, fmt: CodeFormat) -> Tensor:
    lines = axes(x, fmt.granularity)
    g = coding.group_length(lines.shape[1], fmt.group_size)
    per_sample = x.abs().amax(dim=(1, 2, 3)).clamp(min=1e-8) / F(TOP[fmt.dtype])
    out = torch.zeros_like(lines)
    for row, start in itertools.product(range(lines.shape[0]), range(0, lines.shape[1], g)):
        sample = row // (lines.shape[0] // x.shape[0])
        unit = 1.0
        while unit * 448 < float(per_sample[sample]):
            unit *= 2
        while unit / 2 * 448 >= float(per_sample[sample]):
            unit /= 2
        group = lines[row, start : start + g]
        out[row, start : start + g] = torch.tensor(by_hand(group.tolist(), fmt.dtype, fmt.mode, unit))
    return out


def sample(mode: str) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, 2, 12, generator=draw)
    x[..., 1] *= 20
    x[1] *= 1e-3
    x[0, 0] = 0.0
    return x if mode != "release" else x.abs() * 30 * torch.sign(torch.randn(x.shape, generator=draw))


CASES = [*itertools.product(("rcm", "release"), (4, 5, 0), ("token", "channel", "head", "tensor")), ("official", 4, "token")]


@pytest.mark.parametrize(("mode", "group_size", "granularity"), CASES)
def test_every_symmetric_code_equals_the_rule_by_hand(mode, group_size, granularity):
    for dtype in ("int8", "int4", "int2") if mode == "official" else ("fp8", "fp4", "int8", "int4", "int2"):
        x = sample(mode)
        fmt = CodeFormat(dtype, group_size, granularity, False, mode)
        coded = coding.encode(x, fmt)
        decoded = coding.decode(coded)
        assert torch.equal(axes(decoded, granularity), expected(x, fmt)), dtype


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
@pytest.mark.parametrize("granularity", ["token", "channel", "head", "tensor"])
def test_asymmetric_groups_span_their_range(dtype, granularity):
    x = sample("rcm") + 3.0
    bits = {"int8": 8, "int4": 4, "int2": 2}[dtype]
    decoded = axes(coding.decode(coding.encode(x, CodeFormat(dtype, 5, granularity, True, "rcm"))), granularity)
    lines = axes(x, granularity)
    for start in range(0, lines.shape[1], 5):
        group, found = lines[:, start : start + 5], decoded[:, start : start + 5]
        spread = group.amax(1, keepdim=True) - group.amin(1, keepdim=True)
        # half a step, and the rounding of zero and scale to fp16
        assert bool(((found - group).abs() <= 0.51 * spread / (2**bits - 1) + 2.0**-10 * (spread + group.abs().amax()) + 1e-6).all())


@pytest.mark.parametrize("dtype", ["int4", "int2", "fp4"])
@pytest.mark.parametrize("mode", ["rcm", "official"])
def test_bytes_hold_codes_in_the_order_of_the_mode(dtype, mode):
    fmt = CodeFormat(dtype, 0, "token", False, mode)
    bits = 8 // fmt.per_byte
    numbers = torch.arange(fmt.per_byte, dtype=torch.uint8).view(1, -1, 1)
    places = range(fmt.per_byte - 1, -1, -1) if mode == "official" else range(fmt.per_byte)
    assert coding.pack(numbers, fmt).flatten().tolist() == [sum(i << (bits * place) for i, place in enumerate(places))]


def test_a_tensor_far_from_one_keeps_its_relative_error():
    """e4m3 scales below 2^-9 vanish in "release"; in "rcm" they count in a unit of the sample."""
    x = torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(0))

    def error(mode: str, factor: float) -> float:
        decoded = coding.decode(coding.encode(x * factor, CodeFormat("int4", 16, "token", False, mode)))
        return float((decoded / factor - x).norm() / x.norm())

    assert error("rcm", 2.0**-12) == error("rcm", 1.0) < 0.2
    assert error("release", 2.0**-12) == 1.0


def test_samples_of_a_batch_do_not_touch_each_other():
    x = torch.randn(2, 6, 2, 8, generator=torch.Generator().manual_seed(1))
    for dtype in ("fp4", "int2"):
        fmt = CodeFormat(dtype, 4, "channel", False, "rcm")
        both = coding.decode(coding.encode(torch.cat([x[:1], 1000 * x[1:]]), fmt))
        assert torch.equal(both[:1], coding.decode(coding.encode(x[:1], fmt)))
