"""Networks in training with FP8 products: against the formula in float64, with tangents, under
recomputation, sharded, and what is refused.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rcm.configs import registry_distill
from rcm.configs.compose import compose_run
from rcm.core.dtypes import Precision
from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.kernels.fused import quantise
from rcm.nets.condition import Condition
from rcm.nets.layers import Linear
from rcm.nets.trained_fp8 import TrainedFP8Linear, train_in_fp8_
from rcm.parallel.apply import parallelize
from rcm.parallel.checkpointing import MODES, SACConfig, checkpoint_blocks
from rcm.parallel.mesh import ParallelDims
from tests.support.dist import run_ranks
from tests.support.toy_method import CHANNELS, CONFIG, FRAMES, HEIGHT, LAYOUT, WIDTH, make_net

F64 = torch.float64


def rounded(x: Tensor) -> Tensor:
    """What the rows of `x` stand for in e4m3."""
    q, scale = quantise.reference(x)
    return q.double() * scale.double()


def test_value_and_gradients_are_those_of_the_rounded_factors():
    torch.manual_seed(0)
    layer = Linear(64, 48).double()
    x, grad = torch.randn(2, 5, 64, dtype=F64, requires_grad=True), torch.randn(2, 5, 48, dtype=F64)
    y = TrainedFP8Linear(layer)(x)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    rows, grads, weight = x.detach().flatten(0, 1), grad.flatten(0, 1), layer.weight.detach()
    value = rounded(rows) @ rounded(weight).t() + layer.bias.detach()
    expected = (rounded(grads) @ rounded(weight.t()).t(), grads.t() @ rows, grads.sum(0))
    torch.testing.assert_close(y.detach().flatten(0, 1), value, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.view(theirs.shape), theirs, rtol=1e-12, atol=1e-12)
    exact = rows @ weight.t() + layer.bias.detach()
    assert 5e-3 < (value - exact).norm() / exact.norm() < 5e-2


def run(net: nn.Module, batch: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator, dtype=F64)[batch]
    text = torch.randn(2, 5, CONFIG.text_dim, generator=generator, dtype=F64)[batch]
    return net(x, torch.tensor([[300.0], [700.0]], dtype=F64)[batch], Condition(text), LAYOUT)


def gradients(net: nn.Module, batch: slice = slice(None)) -> dict[str, Tensor]:
    run(net, batch).square().mean().backward()
    return {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in net.named_parameters()}


def test_a_network_keeps_its_names_and_its_gradients_are_near():
    plain = make_net(seed=0, dtype=F64)
    net = train_in_fp8_(deepcopy(plain), "fp8")
    left = {path for path, m in net.blocks[0].named_modules() if type(m) is Linear}
    assert left == {"cross_attn.k", "cross_attn.v"}
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    expected, found = gradients(plain), gradients(net)
    error = sum((found[k] - expected[k]).square().sum() for k in found).sqrt() / sum(expected[k].square().sum() for k in found).sqrt()
    assert 1e-3 < error < 0.1


def test_tangents_are_those_of_the_plain_network():
    plain = make_net(seed=0, dtype=F64)
    x, t = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, dtype=F64), torch.full((1, 1), 400.0, dtype=F64)
    cond, along = Condition(torch.randn(1, 5, CONFIG.text_dim, dtype=F64)), (torch.ones_like(x), torch.ones_like(t))
    nets = (plain, train_in_fp8_(deepcopy(plain), "fp8"))
    expected, found = (jvp(lambda x, t, net=net: net(x, t, cond, LAYOUT), (x, t), along) for net in nets)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_recomputation_changes_no_bit(mode: str):
    expected = gradients(train_in_fp8_(make_net(seed=0, dtype=F64), "fp8"))
    net = train_in_fp8_(make_net(seed=0, dtype=F64), "fp8")
    checkpoint_blocks(net, mode=mode)
    found = gradients(net)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def on_ranks() -> dict[str, dict[str, Tensor]]:
    return {"shards": on_layout(ParallelDims(1, 2, 1)), "context": on_layout(ParallelDims(1, 1, 2))}


def on_layout(dims: ParallelDims) -> dict[str, Tensor]:
    net = parallelize(
        make_net(seed=0, dtype=F64),
        dims=dims,
        precision=Precision.preset("fp64"),
        checkpoint=SACConfig("block_wise", keep_last_blocks=1),
        linear_precision="fp8",
    )
    return gradients(net, slice(dims.data_rank, dims.data_rank + 1) if dims.num_data_ranks > 1 else slice(None))


@pytest.mark.dist
def test_ranks_together_are_one(tmp_path: Path) -> None:
    """Rows are tokens, which no layout cuts, and gathered weights are whole."""
    expected = gradients(train_in_fp8_(make_net(seed=0, dtype=F64), "fp8"))
    for layouts in run_ranks(2, on_ranks, tmp_path=tmp_path):
        for layout, found in layouts.items():
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9, msg=f"{layout}: {name}")


M = "model.config."
REFUSALS = [
    (
        "toy_tf_dcm_c1-1",
        [f"{M}net_causal_teacher.linear_precision=fp8"],
        r"net_causal_teacher.*frozen; set model.config.frozen_weights=fp8",
    ),
    ("toy_sf_dmd_lora_c3-3", [f"{M}net.linear_precision=fp8"], "lora.rank"),
    ("toy_tf_c1-1", [f"{M}net.linear_precision=fp8", f"{M}compile=True"], "compile=True"),
    ("toy_tf_c1-1", [f"{M}net.linear_precision=fp8", f"{M}net.dim=72", f"{M}net.num_heads=6"], "width 72.*multiples of 16"),
    (
        "toy_sf_dmd_c1-1",
        [
            f"{M}net_fake_score.linear_precision=fp8",
            f"{M}gan.loss_scale=0.1",
            f"{M}gan.r1=exact",
            f"{M}attention_backend=reference",
            f"{M}fused_layers=off",
        ],
        "net_fake_score.linear_precision=fp8 cannot be differentiated twice",
    ),
    ("toy_tf_c1-1", [f"{M}net.linear_precision=fp4"], "linear_precision"),
    ("toy_tf_c1-1", [f"{M}net.sac_config.mode=none", f"{M}net.sac_config.keep_last_blocks=1"], "keep_last_blocks=1 has no effect"),
    ("toy_tf_c1-1", [f"{M}net.sac_config.mode=block_wise", f"{M}net.sac_config.keep_last_blocks=99"], r"keeps all \d+ blocks"),
    ("toy_tf_c1-1", [f"{M}net.sac_config.keep_last_blocks=-1"], "keep_last_blocks=-1 must be in 0 to 1024"),
]


@pytest.mark.parametrize(("experiment", "more", "told"), REFUSALS, ids=lambda v: str(v)[:40])
def test_what_cannot_be_combined_is_refused(experiment: str, more: list[str], told: str) -> None:
    registry_distill.register()
    with pytest.raises(ConfigError, match=told):
        compose_run([f"experiment={experiment}", *more], environ={}, world_size=1, require_inputs=False)
