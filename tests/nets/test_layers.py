"""Layers against definitions written another way."""

from __future__ import annotations

import math

import torch

from rcm.nets.layers import AffineLayerNorm, GatedAdd, ModulatedNorm, Patchify, PromotedLinear, RMSNorm, Sinusoid, Unpatchify

F64 = torch.float64


def test_norms_and_modulation():
    x = torch.randn(2, 3, 4, 8, dtype=F64) * 3 + 1
    norm = RMSNorm(8, eps=1e-6).double()
    norm.weight.data.normal_()
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    shift, scale = torch.randn(2, 2, 3, 1, 8, dtype=F64)
    torch.testing.assert_close(ModulatedNorm(8, eps=1e-6)(x, shift, scale), plain * (1 + scale) + shift)
    affine = AffineLayerNorm(8, eps=1e-6).double()
    torch.nn.init.normal_(affine.weight)
    torch.nn.init.normal_(affine.bias)
    torch.testing.assert_close(affine(x), plain * affine.weight + affine.bias)
    gate = torch.randn(2, 1, 1, 8, dtype=F64)
    torch.testing.assert_close(GatedAdd()(x, plain, gate), x + gate * plain)


def test_dtypes_of_reduced_precision():
    x, wide = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 1, 1, 8)
    assert RMSNorm(8, eps=1e-6).bfloat16()(x).dtype == torch.bfloat16
    assert AffineLayerNorm(8, eps=1e-6).bfloat16()(x).dtype == torch.bfloat16
    assert GatedAdd()(x, x, wide).dtype == torch.bfloat16
    assert ModulatedNorm(8, eps=1e-6)(x, wide, wide).dtype == torch.float32
    linear = PromotedLinear(8, 5).bfloat16()
    expected = torch.nn.functional.linear(wide, linear.weight.float(), linear.bias.float())
    assert torch.equal(linear(wide), expected) and linear(wide).dtype == torch.float32


def test_rms_statistics_are_float32_in_bfloat16():
    """Squares of 4096 values of about 1 summed in bfloat16 would stop growing at 256."""
    x = torch.ones(1, 4096).bfloat16()
    torch.testing.assert_close(RMSNorm(4096, eps=0).bfloat16()(x), x, rtol=0, atol=0)


def test_sinusoid_is_cosines_then_sines_in_float64():
    timestep = torch.tensor([[0.0, 937.5], [41.25, 1000.0]], dtype=F64)
    got = Sinusoid(8)(timestep, F64)
    for b in range(2):
        for f in range(2):
            angles = [timestep[b, f].item() * 10000 ** (-j / 4) for j in range(4)]
            expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
            torch.testing.assert_close(got[b, f], torch.tensor(expected, dtype=F64), rtol=0, atol=1e-12)
    assert Sinusoid(8)(timestep, torch.float32).dtype == torch.float32
    rounded = torch.tensor([[987.654]]).bfloat16()
    torch.testing.assert_close(Sinusoid(8)(rounded, F64), Sinusoid(8)(torch.tensor([[988.0]], dtype=F64), F64), rtol=0, atol=0)


def test_patch_orders():
    """Patchify: channel slowest, as conv3d over (1, 2, 2); unpatchify: channel fastest."""
    x, weight = torch.randn(2, 3, 2, 4, 6, dtype=F64), torch.randn(5, 3, 1, 2, 2, dtype=F64)
    tokens = Patchify((2, 2))(x)
    assert tokens.shape == (2, 2, 6, 12)
    conv = torch.nn.functional.conv3d(x, weight, stride=(1, 2, 2))
    torch.testing.assert_close(tokens @ weight.flatten(1).T, conv.flatten(3).permute(0, 2, 3, 1))

    patches = torch.randn(2, 2, 6, 12, dtype=F64)
    got = Unpatchify((2, 2))(patches, (2, 3))
    assert got.shape == (2, 3, 2, 4, 6)
    for c, f, row, column in [(0, 0, 0, 0), (2, 1, 3, 4), (1, 0, 2, 5), (2, 1, 1, 1)]:
        feature = ((row % 2) * 2 + column % 2) * 3 + c
        assert got[1, c, f, row, column] == patches[1, f, (row // 2) * 3 + column // 2, feature]
