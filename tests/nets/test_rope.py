"""Rotary embedding against complex multiplication written from docs/reference/wan.md#positions, and
its limits.
"""

from __future__ import annotations

import cmath
import itertools

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.nets.positions import Positions
from rcm.nets.rope import RopeTables, axis_channels, rotate

CPU = torch.device("cpu")


def by_hand(x: torch.Tensor, position: tuple[int, int, int], split: tuple[int, int, int]) -> list[float]:
    """One head vector, pairs (2j, 2j+1) as complex numbers, axes in the order frame, row,
    column.
    """
    out, first = [], 0
    for p, channels in zip(position, split, strict=True):
        for j in range(channels // 2):
            z = complex(x[first + 2 * j], x[first + 2 * j + 1]) * cmath.exp(1j * p * 10000 ** (-2 * j / channels))
            out += [z.real, z.imag]
        first += channels
    return out


def test_channel_split_of_the_published_head_size():
    assert axis_channels(128) == (44, 42, 42)
    assert axis_channels(16) == (8, 4, 4)
    for bad in (4, 17):
        with pytest.raises(ValueError, match="head size"):
            axis_channels(bad)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_rotation_of_every_token(head_dim):
    frames, grid = (3, 0, 7), (2, 3)
    table = RopeTables(head_dim, max_rows=4, max_columns=4).table(frames, grid, device=CPU, dtype=torch.float64)
    x = torch.randn(1, 18, 2, head_dim, dtype=torch.float64)
    got = rotate(x, table)
    for token in range(18):
        position = (frames[token // 6], token % 6 // 3, token % 3)
        expected = by_hand(x[0, token, 1], position, axis_channels(head_dim))
        torch.testing.assert_close(got[0, token, 1], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_dtypes():
    tables = RopeTables(16, max_rows=4, max_columns=4)
    exact = tables.table((5,), (2, 2), device=CPU, dtype=torch.float64)
    single = tables.table((5,), (2, 2), device=CPU, dtype=torch.float32)
    assert torch.equal(single.cos, exact.cos.float()), "angles are float64 before the cast"
    x = torch.randn(1, 4, 1, 16)
    assert rotate(x.bfloat16(), single).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x.bfloat16(), single), rotate(x.bfloat16().float(), single).bfloat16(), rtol=0, atol=0)


def test_limits_and_mismatches_raise():
    tables = RopeTables(16, max_rows=4, max_columns=5)
    for frames, grid, axis in (
        ((0,), (5, 1), "max_rows"),
        ((0,), (1, 6), "max_columns"),
    ):
        with pytest.raises(ConfigError, match=axis):
            tables.table(frames, grid, device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="no frames"):
        tables.table((), (1, 1), device=CPU, dtype=torch.float32)
    table = tables.table((0, 1), (2, 2), device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="8 tokens"):
        rotate(torch.randn(1, 7, 1, 16), table)
    with pytest.raises(ValueError, match="head size 16"):
        rotate(torch.randn(1, 8, 1, 12), table)


def test_time_has_no_limit():
    """Rotary attention knows differences of positions only, however far they are from the
    beginning.
    """
    tables = RopeTables(16, max_rows=2, max_columns=2)
    q, k = torch.randn(2, 1, 4, 1, 16, dtype=torch.float64).unbind(0)
    near, far = (
        torch.einsum("bqnd,bknd->bqk", *(rotate(x, tables.table((t,), (2, 2), device=CPU, dtype=torch.float64)) for x, t in pair))
        for pair in (((q, 7), (k, 2)), ((q, 10**7 + 5), (k, 10**7)))
    )
    torch.testing.assert_close(near, far, rtol=0, atol=1e-7)


def test_positions_per_sample_and_head():
    tables = RopeTables(16, max_rows=4, max_columns=4)
    where = torch.randint(0, 4, (2, 6, 3, 3))
    x = torch.randn(2, 6, 3, 16, dtype=torch.float64)
    got = rotate(x, tables.at(Positions((2, 2), tokens=where), device=CPU, dtype=torch.float64))
    for b, token, head in itertools.product(range(2), range(6), range(3)):
        expected = by_hand(x[b, token, head], tuple(where[b, token, head].tolist()), axis_channels(16))
        torch.testing.assert_close(got[b, token, head], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_tables_are_kept_bounded_and_usable_after_inference_mode():
    tables = RopeTables(16, max_rows=4, max_columns=4)
    with torch.inference_mode():
        first = tables.table((0,), (1, 1), device=CPU, dtype=torch.float32)
    assert tables.table((0,), (1, 1), device=CPU, dtype=torch.float32) is first
    x = torch.randn(1, 1, 1, 16, requires_grad=True)
    rotate(x, first).sum().backward()
    for frame in range(1, 60):
        tables.table((frame,), (1, 1), device=CPU, dtype=torch.float32)
    assert len(tables._kept) <= 32 and ((0,), (1, 1), CPU, torch.float32) not in tables._kept
