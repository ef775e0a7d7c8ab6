"""FP8 linears: the rule against a float64 search over all e4m3 numbers, replacement in place, the
stated error, every refusal.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.kernels.fused import quantise
from rcm.nets.fp8_linear import FP8Linear
from rcm.nets.wan.fp8 import LAYERS, chosen_layers, noise_velocity, quantise_linears_
from tests.support.tiny_nets import HEIGHT, WIDTH, tiny_net

SIZE = (HEIGHT, WIDTH)


def e4m3_numbers() -> torch.Tensor:
    """All finite e4m3 numbers from their definition: 4 exponent bits of bias 7, 3 of mantissa, one
    NaN per sign.
    """
    found = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    found += [m / 8 * 2.0**-6 for m in range(8)]
    return torch.tensor(sorted({*found, *(-x for x in found)}), dtype=torch.float64)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows of `x` float64 as the rule rounds them: the nearest of all e4m3 numbers, times the
    scale.
    """
    numbers = e4m3_numbers()
    scale = x.abs().amax(dim=1, keepdim=True) / 448
    nearest = ((x / scale)[..., None] - numbers).abs().argmin(dim=-1)
    return numbers[nearest] * scale


def layer(inputs: int = 64, outputs: int = 48, *, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(inputs, outputs)
    return made.requires_grad_(False)


def test_a_layer_is_the_product_of_rounded_matrices():
    plain = layer()
    torch.manual_seed(1)
    x = torch.randn(2, 3, 5, 64)
    expected = rounded(x.double().view(-1, 64)) @ rounded(plain.weight.double()).t() + plain.bias.double()
    found = FP8Linear(plain)(x)
    assert found.dtype == torch.float32
    assert found.shape == (2, 3, 5, 48)
    torch.testing.assert_close(found.double().view(-1, 48), expected, rtol=1e-5, atol=1e-5)
    error = (found - plain(x)).norm() / plain(x).norm()
    assert 0.01 < error < 0.05  # two roundings of at most 1/16, averaged


@pytest.mark.parametrize("factor", [1e-25, 1.0, 1e25])
def test_every_token_and_every_output_has_a_scale_of_its_own(factor):
    plain, x = layer(), torch.randn(4, 64)
    loud = plain.weight.clone()
    loud[7] *= 1e3
    plain.weight.copy_(loud)
    x[2] *= factor
    for found, exact in ((quantise.quantise_rows(x), x), (quantise.quantise_rows(plain.weight), plain.weight)):
        off = found[0].double() * found[1].double() - exact.double()
        assert (off.norm(dim=1) / exact.double().norm(dim=1)).max() < 0.04


def test_edges_of_rows():
    x = torch.zeros(4, 32)
    x[1, 3], x[2, 4], x[3, 5] = float("nan"), float("inf"), 1e-44
    y = FP8Linear(layer(32, 16))(x)
    assert torch.equal(y[0], layer(32, 16).bias)
    assert y[1:3].isnan().all()
    assert y[3].isfinite().all()


def test_gelu_before_the_rounding_is_the_layer_in_between():
    plain, x = layer(), torch.randn(6, 64)
    fused, apart = FP8Linear(plain, gelu=True), FP8Linear(plain)
    assert torch.equal(fused(x), apart(nn.functional.gelu(x, approximate="tanh")))


@pytest.mark.parametrize("which", ["all", "auto", "qkv", "ffn_out", "o, cross_q"])
def test_a_network_computes_as_one_whose_layers_are_replaced_one_by_one(which):
    net = tiny_net(dtype=torch.float32)
    single = deepcopy(net).eval()
    for block in single.blocks:
        for name in chosen_layers(which):
            for path in LAYERS[name]:
                block.set_submodule(path, FP8Linear(block.get_submodule(path)))
    velocity = noise_velocity(net, size=SIZE, frames=2)
    with torch.no_grad():
        before, expected = velocity(net), velocity(single)
    report = quantise_linears_(net, which=which, velocity=velocity)
    with torch.no_grad():
        found = velocity(net)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert report.error == pytest.approx(((found - before).norm() / before.norm()).item(), rel=1e-4)
    assert 1e-3 < report.error < 0.2
    assert len(report.replaced) == len(net.blocks) * sum(len(LAYERS[name]) for name in chosen_layers(which))
    assert f"{len(report.replaced)} layers" in str(report)


def test_shared_projections_are_right_in_any_order_and_hold_nothing():
    net = tiny_net(dtype=torch.float32)
    attention = net.blocks[0].self_attn
    apart = [FP8Linear(getattr(attention, name)) for name in "qkv"]
    quantise_linears_(net, which="qkv")
    q, k, v = attention.q, attention.k, attention.v
    x, other = torch.randn(2, 1, 3, 64), torch.randn(2, 1, 3, 64)
    with torch.no_grad():
        first = q(x)
        crossed, again, x_k = v(other), q(x), k(x)
        x.mul_(2)
        doubled = v(x)
        assert torch.equal(first, apart[0](x / 2))
        assert torch.equal(crossed, apart[2](other))
        assert torch.equal(again, first)
        assert torch.equal(x_k, apart[1](x / 2))
        assert torch.equal(doubled, apart[2](x))
        for part in (q, k, v, q, k, v):
            part(other)
    assert q.shared.held is None


def test_sizes_that_do_not_fit_stay():
    net = tiny_net(dtype=torch.float32, ffn_dim=100)
    report = quantise_linears_(net, which="all")
    assert report.kept == tuple(f"blocks.{i}.ffn.{j}" for i in (0, 1) for j in (0, 2))
    assert "4 kept" in str(report) and len(report.replaced) == 12
    assert not any(isinstance(module, FP8Linear) for module in net.blocks[1].ffn.modules())


def test_casts_leave_rounded_weights_alone_and_copies_are_whole():
    net = tiny_net(dtype=torch.float32)
    quantise_linears_(net, which="all")
    linear = net.blocks[0].ffn[2]
    before = linear.weight.clone(), linear.weight_scale.clone()
    net.to(torch.bfloat16)
    copy = deepcopy(net).blocks[0].ffn[2]
    for found in (linear, copy):
        assert found.weight.dtype == torch.float8_e4m3fn
        assert torch.equal(found.weight.view(torch.int8), before[0].view(torch.int8))
        assert torch.equal(found.weight_scale, before[1])


def test_refusals_are_one_sentence():
    net = tiny_net(dtype=torch.float32)
    state, velocity = net.state_dict(), noise_velocity(net, size=SIZE)
    fresh = tiny_net(dtype=torch.float32)
    fresh.head.head.weight.data.zero_()
    fresh.head.head.bias.data.zero_()
    for call, said in (
        (lambda: quantise_linears_(net, which="qkx"), "unknown FP8 layers 'qkx'"),
        (lambda: quantise_linears_(fresh, velocity=noise_velocity(fresh, size=SIZE)), "the velocity is zero"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    assert set(net.state_dict()) == set(state)
    quantise_linears_(net, which="ffn_in")
    marked = {key: torch.full_like(value, 7) for key, value in state.items()}
    linear, x = net.blocks[0].ffn[0], torch.randn(2, 64)
    for call, said in (
        (net.state_dict, "are not saved"),
        (linear.state_dict, "are not saved"),
        (lambda: net.load_state_dict(marked), "are not loaded"),
        (net.train, "do not train"),
        (lambda: velocity(net), "gradients nor tangents"),
        (lambda: jvp(linear, (x,), (x,)), "gradients nor tangents"),
        (lambda: quantise_linears_(net), "quantised already"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (net.patch_embedding.weight == 7).any()
