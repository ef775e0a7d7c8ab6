"""FSDP2 on one rank: mixed precision, frozen networks, stale copies, and what needs a process
group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.tensor import DTensor

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.parallel.apply import parallelize
from rcm.parallel.fsdp import gathered, is_mixed, local, stored_parameters
from rcm.parallel.mesh import ParallelDims, process_group
from tests.support.toy_method import CHANNELS, CONFIG, FRAMES, HEIGHT, LAYOUT, WIDTH, make_net

BF16 = Precision.preset("bf16")


@pytest.fixture
def group() -> Iterator[None]:
    with process_group("cpu"):
        yield


def forward(net: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    x = torch.linspace(-1, 1, CHANNELS * FRAMES * HEIGHT * WIDTH).view(1, CHANNELS, FRAMES, HEIGHT, WIDTH).to(dtype)
    text = torch.linspace(-1, 1, 5 * CONFIG.text_dim).view(1, 5, -1).to(dtype)
    return net(x, torch.full((1, 1), 300.0), Condition(text), LAYOUT)


def test_mixed_precision_keeps_fp32_masters_and_computes_in_bf16(group: None) -> None:
    reference = make_net(seed=0)
    expected = forward(reference, torch.float32)
    net = parallelize(make_net(seed=0), dims=ParallelDims(), precision=BF16)
    seen = []
    net.blocks[0].self_attn.q.register_forward_hook(lambda module, _, out: seen.append((module.weight.dtype, out.dtype)))
    net.sinusoid.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    got = forward(net, torch.bfloat16)
    got.square().mean().backward()
    assert seen == [torch.float32, (torch.bfloat16, torch.bfloat16)]
    assert {p.dtype for p in net.parameters()} == {torch.float32} == {p.grad.dtype for p in net.parameters()}
    assert 0 < (got - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("kept", [False, True])
def test_weights_written_after_a_forward_without_gradient_are_used(group: None, kept: bool) -> None:
    """FSDP2's root by default stays gathered after such a forward and would go on computing with
    the old weights (an EMA swap would then be ignored).
    """
    net = parallelize(make_net(seed=0), dims=ParallelDims(), precision=BF16)
    with torch.no_grad():
        with gathered(net) if kept else nullcontext():
            before = forward(net, torch.bfloat16)
            assert all(isinstance(p, DTensor) is not kept for p in net.parameters())
        assert all(isinstance(p, DTensor) for p in net.parameters())
        for p in stored_parameters(net).values():
            local(p).mul_(0.5)
        after = forward(net, torch.bfloat16)
    half = make_net(seed=0)
    with torch.no_grad():
        for p in half.parameters():
            p.mul_(0.5)
        fresh = forward(parallelize(half, dims=ParallelDims(), precision=BF16), torch.bfloat16)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


def test_a_frozen_network_is_stored_as_it_computes() -> None:
    net = parallelize(make_net(seed=0).requires_grad_(False), dims=ParallelDims(), precision=BF16, checkpoint="block_wise")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in net.parameters())
    forward(net, torch.bfloat16)


def test_mixed_precision_without_a_process_group_says_what_to_do() -> None:
    assert is_mixed(BF16) and not is_mixed(Precision.preset("fp32"))
    with pytest.raises(ConfigError, match="process_group"):
        parallelize(make_net(seed=0), dims=ParallelDims(), precision=BF16)
    with pytest.raises(ConfigError, match="context_parallel_size"):
        parallelize(make_net(seed=0), dims=ParallelDims(1, 1, 3), precision=BF16)


def test_one_rank_in_one_dtype_stays_as_it_was() -> None:
    net = make_net(seed=0)
    expected = forward(net, torch.float32)
    same = parallelize(net, dims=ParallelDims(), precision=Precision.preset("fp32"))
    assert same is net and type(net).__name__ == "WanDiT" and torch.equal(forward(net, torch.float32), expected)
