"""Layers against definitions written another way."""

from __future__ import annotations

import math

import pytest
import torch

from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.nets.layers import (
    AffineLayerNorm,
    GatedAdd,
    Gelu,
    Linear,
    ModulatedNorm,
    Patchify,
    PromotedLinear,
    RMSNorm,
    Sinusoid,
    Unpatchify,
)
from rcm.nets.rope import RopeTables, Rotate
from tests.support.tiny_nets import tiny_net
from tests.support.watched import Watched

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
    assert ModulatedNorm(8, eps=1e-6)(x, wide, wide, dtype=torch.bfloat16).dtype == torch.bfloat16
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


@pytest.mark.parametrize("bias", [True, False])
def test_linear_carries_a_tangent_in_one_product(bias):
    x, x_dot = (torch.randn(2, 3, 4, 8, dtype=F64) for _ in range(2))
    linear = Linear(8, 5, bias=bias).double()
    plain = torch.nn.Linear(8, 5, bias=bias).double()
    plain.load_state_dict(linear.state_dict())
    seen: list[str] = []
    with Watched(lambda func, _: seen.append(func.overloadpacket.__name__)):
        got = jvp(linear, (x,), (x_dot,))
    torch.testing.assert_close(got, jvp(plain, (x,), (x_dot,)))
    views = {"view", "_unsafe_view", "t", "alias", "is_same_size", "_has_same_storage_numel"}
    moving = [name for name in seen if name not in views]
    assert sorted(moving) == ["addmm" if bias else "mm", "mm"], "the tangent of a constant weight or bias costs passes over memory"


def test_linear_keeps_a_tangent_of_its_weight():
    x, linear = torch.randn(3, 8, dtype=F64), Linear(8, 5).double()
    weight, weight_dot = torch.randn(2, 5, 8, dtype=F64)

    def call(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(linear, {"weight": weight}, (x,))

    _, tangent = jvp(call, (weight, x), (weight_dot, x))
    torch.testing.assert_close(tangent, x @ weight_dot.T + x @ weight.T)


def test_demanded_kernels_never_give_way_to_plain_formulas(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, row = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 1, 16)
    table = RopeTables(16, max_rows=4, max_columns=4).table((0,), (2, 2), device=torch.device("cpu"), dtype=torch.float32)
    calls = [
        (RMSNorm(16, eps=1e-6), (x,)),
        (AffineLayerNorm(16, eps=1e-6), (x,)),
        (ModulatedNorm(16, eps=1e-6), (x, row, row)),
        (GatedAdd(), (x, x, row)),
        (Gelu(), (x,)),
        (Rotate(), (x.transpose(1, 2), table)),
    ]
    for layer, inputs in calls:
        layer.fused = "on"
        with pytest.raises(ConfigError, match=r"fused_layers=on"):
            layer(*inputs)


def test_the_setting_reaches_every_layer_of_a_network():
    net = tiny_net()
    assert net.fused == "auto"
    net.set_fused("off")
    settings = [module.fused for module in net.modules() if hasattr(module, "fused")]
    assert len(settings) > 20 and set(settings) == {"off"}
    with pytest.raises(ConfigError, match="fused_layers"):
        net.set_fused("maybe")


def test_rope_tables_per_pair():
    table = RopeTables(16, max_rows=9, max_columns=9).table((3, 1), (2, 3), device=torch.device("cpu"), dtype=torch.float32)
    cos, sin = table.per_pair
    assert cos.shape == sin.shape == (12, 8) and cos.is_contiguous() and sin.is_contiguous() and table.per_pair[0] is cos
    x = torch.randn(1, 12, 2, 16)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * cos[:, None] - odd * sin[:, None], even * sin[:, None] + odd * cos[:, None]], dim=-1).flatten(3)
    torch.testing.assert_close(Rotate()(x, table), turned)
