"""Frozen networks with weights in e4m3: against the network of the rounded weights, with tangents,
through FSDP2, and what is refused.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rcm.core.dtypes import Precision
from rcm.core.dual import jvp
from rcm.core.errors import ConfigError
from rcm.kernels.fused import quantise
from rcm.nets.condition import Condition
from rcm.nets.fp8_linear import FP8Linear
from rcm.nets.frozen_fp8 import FrozenFP8Linear, is_rounded, round_linears_
from rcm.nets.layers import Linear
from rcm.nets.trained_fp8 import train_in_fp8_
from rcm.nets.wan.model import WanDiT
from rcm.parallel.apply import parallelize
from rcm.parallel.fsdp import stored_parameters
from rcm.parallel.init import check_equal, load_full, materialise, on_meta
from rcm.parallel.mesh import ParallelDims
from tests.support.dist import run_ranks
from tests.support.tiny_nets import tiny_net
from tests.support.toy_method import CHANNELS, CONFIG, FRAMES, HEIGHT, LAYOUT, WIDTH, make_net


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, CONFIG.text_dim, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.tensor([[300.0], [700.0]], dtype=torch.float64), Condition(text.to(dtype))


def velocity(net: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    x, t, cond = inputs(dtype)
    with torch.no_grad():
        return net(x, t.to(dtype), cond, LAYOUT)


@torch.no_grad()
def of_rounded_weights(net: WanDiT) -> WanDiT:
    """The plain network whose weights are what the rounded one computes with."""
    net = deepcopy(net)
    for layer in net.blocks.modules():
        if type(layer) is Linear:
            codes, scale = quantise.reference(layer.weight)
            layer.weight.copy_(codes.to(layer.weight.dtype) * scale)
    return net


def frozen(dtype: torch.dtype = torch.float64) -> WanDiT:
    return make_net(seed=0, dtype=dtype).requires_grad_(False)


def test_storage_computes_as_the_network_of_rounded_weights():
    net = frozen()
    expected, plain = velocity(of_rounded_weights(net)), velocity(net)
    rounded = round_linears_(deepcopy(net), "fp8_storage")
    assert is_rounded(rounded) and not is_rounded(net)
    torch.testing.assert_close(velocity(rounded), expected, rtol=1e-12, atol=1e-12)
    error = (expected - plain).norm() / plain.norm()
    assert 1e-3 < error < 0.2
    # embeddings, time, modulation and head stay as they are
    kept = {name for name, p in rounded.named_parameters() if p.itemsize > 1 and p.ndim == 2 and "scale" not in name}
    assert kept and not any(name.startswith("blocks") for name in kept)


def test_tangents_of_storage_are_exact_and_products_refuse_them():
    x, t, cond = inputs(torch.float64)
    along = (torch.ones_like(x), torch.full_like(t, 0.1))

    def found(net: nn.Module) -> tuple[Tensor, Tensor]:
        return jvp(lambda x, t: net(x, t, cond, LAYOUT), (x, t), along)

    net = frozen()
    expected = found(of_rounded_weights(net))
    for mine, theirs in zip(found(round_linears_(deepcopy(net), "fp8_storage")), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    with pytest.raises(ConfigError, match="neither gradients nor tangents.*frozen_weights=fp8_storage"):
        found(round_linears_(deepcopy(net), "fp8"))


def test_gradients_of_inputs_pass_storage_and_products_refuse_them():
    layer = Linear(64, 48).requires_grad_(False)
    x = torch.randn(3, 64, requires_grad=True)
    storage = FrozenFP8Linear(layer, products=False)
    (gradient,) = torch.autograd.grad(storage(x).sum(), x)
    torch.testing.assert_close(gradient, storage.wide(torch.float32).sum(0).expand(3, -1))
    with pytest.raises(ConfigError, match="fp8_storage"):
        FrozenFP8Linear(layer, products=True)(x)


def test_products_are_those_of_inference():
    layer, x = Linear(64, 48).requires_grad_(False), torch.randn(2, 5, 64)
    assert torch.equal(FrozenFP8Linear(layer, products=True)(x), FP8Linear(layer)(x))


def test_sizes_that_do_not_fit_stay_and_trained_weights_are_refused():
    net = tiny_net(dtype=torch.float32, ffn_dim=100).requires_grad_(False)
    round_linears_(net, "fp8")
    kept = [name for name, m in net.blocks[0].named_modules() if type(m) is Linear]
    assert kept == ["ffn.0", "ffn.2"]
    with pytest.raises(ConfigError, match="trained"):
        round_linears_(tiny_net(), "fp8_storage")


def built(dims: ParallelDims, precision: Precision, which: str) -> nn.Module:
    """As training builds a teacher: on meta, parallelised, given memory, loaded."""
    net = on_meta(lambda: WanDiT(CONFIG, attention="reference").requires_grad_(False))
    parallelize(net, dims=dims, precision=precision, frozen_weights=which)
    materialise(net, device="cpu")
    load_full(net, make_net(seed=0).state_dict())
    check_equal(net, dims=dims)
    return net


def sharded(dims: tuple[int, int, int]) -> dict[str, object]:
    net = built(ParallelDims(*dims), Precision.preset("fp64"), "fp8_storage")
    found = {"velocity": velocity(net)}
    parameters = stored_parameters(net)
    found["bytes"] = parameters["blocks.0.ffn.0.weight"]._local_tensor.nbytes
    found["sharded"] = all(isinstance(p, DTensor) for p in parameters.values())
    return found


@pytest.mark.dist
@pytest.mark.parametrize("dims", [(1, 2, 1), (2, 1, 1), (1, 1, 2)], ids=["shards", "replicas", "context"])
def test_shards_are_rounded_where_they_lie(tmp_path: Path, dims: tuple[int, int, int]) -> None:
    whole = velocity(built(ParallelDims(), Precision.preset("fp64"), "fp8_storage"))
    expected = velocity(of_rounded_weights(frozen(torch.float32)).double())
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
    for found in run_ranks(2, sharded, dims, tmp_path=tmp_path):
        torch.testing.assert_close(found["velocity"], whole, rtol=1e-12, atol=1e-12)
        assert found["sharded"]
        assert found["bytes"] == CONFIG.dim * CONFIG.ffn_dim // (1 if dims[0] == 2 else 2)


def test_a_file_with_other_keys_is_named_as_without_rounding():
    weights = make_net(seed=0).state_dict()
    del weights["blocks.0.ffn.0.weight"]
    net = on_meta(lambda: WanDiT(CONFIG, attention="reference").requires_grad_(False))
    net = parallelize(net, dims=ParallelDims(), precision=Precision.preset("fp32"), frozen_weights="fp8_storage")
    materialise(net, device="cpu")
    with pytest.raises(Exception, match=r"missing 1 key\(s\): blocks.0.ffn.0.weight"):
        load_full(net, weights)


def test_misspelt_words_round_nothing():
    """Any other word stood for one of the forms."""
    for change in (round_linears_, train_in_fp8_):
        net = tiny_net()
        with pytest.raises(ConfigError, match="'fp8_store' is not one of 'compute', 'fp8"):
            change(net, "fp8_store")
        assert not is_rounded(net)
