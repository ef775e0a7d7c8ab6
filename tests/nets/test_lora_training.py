"""Adapters on a frozen base: the base until trained, exact values, tangents and gradients, one
network for several roles.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rcm.core.dtypes import Precision
from rcm.core.dual import guard_tangents, jvp
from rcm.core.errors import ConfigError
from rcm.nets.layout import TokenLayout
from rcm.nets.lora import AdaptedNet, attach, initial_factors
from rcm.nets.wan.adapters import LAYERS, adapted_layers, factor_shapes, largest_rank
from rcm.nets.wan.fp8 import quantise_linears_
from rcm.nets.wan.lora import by_layer, merge
from rcm.nets.wan.model import WanDiT
from rcm.parallel.apply import parallelize
from rcm.parallel.checkpointing import MODES, checkpoint_blocks
from rcm.parallel.init import load_full
from rcm.parallel.mesh import ParallelDims
from tests.support.tiny_nets import GRID, condition, frame_times, latents, tiny_config, tiny_net

RANK, ALPHA = 3, 4.5
FRAMES = 3
ROLES = ("student", "fake_score")


def adapted(*, layers: tuple[str, ...] = LAYERS, trained: bool = True) -> WanDiT:
    """The tiny network with adapters of both roles, in float64; `trained`: no factor is zero."""
    net = tiny_net()
    attach(net, layers, roles=ROLES, rank=RANK, alpha=ALPHA)
    net.double()
    for seed, role in enumerate(ROLES):
        view = AdaptedNet(net, role)
        load_full(view, initial_factors(view, seed=seed))
        generator = torch.Generator().manual_seed(10 + seed)
        with torch.no_grad():
            for p in view.parameters() if trained else ():
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def velocity(net: torch.nn.Module, x: Tensor) -> Tensor:
    layout = TokenLayout.bidirectional(FRAMES, grid=GRID)
    return net(x, frame_times(FRAMES), condition(tiny_config()), layout)


def merged(role: AdaptedNet) -> WanDiT:
    """A plain network with the update of `role` in its weights."""
    net = tiny_net()
    with torch.no_grad():
        for layer, (down, up) in by_layer(role.state_dict()).items():
            weight = net.get_submodule(layer).weight
            weight.copy_(merge(weight, down=down, up=up, scale=ALPHA / RANK))
    return net


def test_before_training_every_role_is_the_base_bit_for_bit() -> None:
    net, x = adapted(trained=False), latents(FRAMES)
    for role in (*ROLES, None):
        assert torch.equal(velocity(AdaptedNet(net, role), x), velocity(tiny_net(), x))
    a, b = (AdaptedNet(net, role).state_dict() for role in ROLES)
    assert not torch.equal(a["blocks.0.ffn.0.lora_A.weight"], b["blocks.0.ffn.0.lora_A.weight"]), "roles start apart"


def test_roles_compute_what_their_merged_weights_compute() -> None:
    net, x = adapted(), latents(FRAMES)
    found = {role: velocity(AdaptedNet(net, role), x) for role in ROLES}
    for role in ROLES:
        truth = velocity(merged(AdaptedNet(net, role)), x)
        assert (found[role] - truth).abs().max() < 1e-12 * truth.abs().max()
    assert (found["student"] - found["fake_score"]).abs().max() > 1e-2
    assert torch.equal(velocity(AdaptedNet(net, None), x), velocity(tiny_net(), x))


def test_tangents_are_exact() -> None:
    role, x, x_dot = AdaptedNet(adapted(), "student"), latents(FRAMES), latents(FRAMES, seed=8)
    whole = merged(role)
    truth = torch.func.jvp(lambda a: velocity(whole, a), (x,), (x_dot,))
    with guard_tangents(role):
        found = jvp(lambda a: velocity(role, a), (x,), (x_dot,))
    for mine, theirs in zip(found, truth, strict=True):
        assert (mine - theirs).abs().max() < 1e-12 * theirs.abs().max()


def test_gradients_are_those_of_the_merged_weights_and_reach_one_role_alone() -> None:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, with dL/dW of an ordinary network at the merged
    weights.
    """
    net, x = adapted(), latents(FRAMES)
    role = AdaptedNet(net, "student")
    velocity(role, x).square().sum().backward()
    truth, strength = merged(role), ALPHA / RANK
    velocity(truth, x).square().sum().backward()
    grads = by_layer({name: p.grad for name, p in role.named_parameters()})
    for layer, (down, up) in by_layer(role.state_dict()).items():
        whole = truth.get_submodule(layer).weight.grad
        for mine, theirs in zip(grads[layer], (strength * up.t() @ whole, strength * whole @ down.t()), strict=True):
            assert (mine - theirs).abs().max() < 1e-11 * theirs.abs().max(), layer
    assert len(grads) == len(LAYERS) * len(net.blocks)
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {
        name for name, _ in net.named_parameters() if ".adapters.student." in name
    }


@pytest.mark.parametrize("mode", MODES)
def test_a_block_is_recomputed_with_the_adapters_it_ran_with(mode: str) -> None:
    """Between a student's forward and its backward, fake score and teacher compute on the same
    network.
    """
    x = latents(FRAMES)

    def gradients(mode: str, *, others: bool) -> list[Tensor]:
        net = adapted()
        checkpoint_blocks(net, mode=mode)
        role = AdaptedNet(net, "student")
        out = velocity(role, x)
        with torch.no_grad():
            for other in (ROLES[1], None) if others else ():
                velocity(AdaptedNet(net, other), x)
        out.square().sum().backward()
        return [p.grad for p in role.parameters()]

    for mine, theirs in zip(gradients(mode, others=True), gradients("none", others=False), strict=True):
        assert (mine - theirs).abs().max() < 1e-12 * theirs.abs().max()


@pytest.mark.slow
def test_compiled_blocks_follow_the_role() -> None:
    """Inductor's code of a block, recomputed: values of all roles, gradients and tangents of
    one.
    """
    x, found = latents(FRAMES), {}
    for compiled in (False, True):
        net = adapted()
        parallelize(net, dims=ParallelDims(), precision=Precision.preset("fp64"), checkpoint="block_wise", compile=compiled)
        role = AdaptedNet(net, "student")
        out = velocity(role, x)
        with torch.no_grad():
            others = [velocity(AdaptedNet(net, other), x) for other in (ROLES[1], None)]
        out.square().sum().backward()
        tangents = jvp(lambda a, role=role: velocity(role, a), (x,), (latents(FRAMES, seed=8),))
        found[compiled] = [out.detach(), *others, *(p.grad for p in role.parameters()), *tangents]
    for mine, theirs in zip(found[True], found[False], strict=True):
        assert (mine - theirs).abs().max() < 1e-11 * theirs.abs().max()


def test_a_role_shows_its_own_tensors_alone() -> None:
    net = adapted(layers=("self_attn.q", "ffn.2"))
    student, teacher = AdaptedNet(net, "student"), AdaptedNet(net, None)
    assert list(teacher.state_dict()) == list(tiny_net().state_dict())
    assert list(student.state_dict()) == [name for name, _ in student.named_parameters()]
    assert "blocks.1.ffn.2.lora_B.weight" in student.state_dict() and len(student.state_dict()) == 8
    shapes = factor_shapes(("self_attn.q", "ffn.2"), net.config, rank=RANK)
    assert [tuple(p.shape) for p in student.parameters()] == shapes * net.config.num_layers
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in student.parameters())
    with pytest.raises(TypeError, match="load_full"):
        student.load_state_dict({})


def test_the_fused_feed_forward_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured passes read the first layer's weight themselves, which would leave its adapters
    out.
    """
    net, x = adapted(layers=("ffn.0",)), latents(FRAMES)
    truth = velocity(AdaptedNet(net, "student"), x)
    monkeypatch.setattr("rcm.nets.layers.Gelu.joins_product", lambda self, x: True)
    assert torch.equal(velocity(AdaptedNet(net, "student"), x), truth)


def test_other_layers_are_refused_by_name() -> None:
    net = adapted()
    with pytest.raises(ConfigError, match="low-rank adapters has no FP8 products.*rcm checkpoint convert"):
        quantise_linears_(net)
    with pytest.raises(ConfigError, match=r"blocks.0.self_attn.q is a AdaptedLinear, which takes no low-rank adapters"):
        attach(net, LAYERS, roles=ROLES, rank=1, alpha=1.0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q", "k", "v", "o", "ffn.0", "ffn.2"), LAYERS),
        (("q",), ("self_attn.q", "cross_attn.q")),
        (("cross_attn.o", "self_attn.o"), ("self_attn.o", "cross_attn.o")),
        (("to_q", "attn2.to_out.0", "ffn.net.2"), ("self_attn.q", "cross_attn.q", "cross_attn.o", "ffn.2")),
        (("ffn.net.0.proj", "q", "self_attn.q"), ("self_attn.q", "cross_attn.q", "ffn.0")),
    ],
)
def test_targets_are_ends_of_names_as_in_peft(targets: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert adapted_layers(targets) == expected


@pytest.mark.parametrize("target", ["", "qkv", "attn", "ffn", "norm_q", "head.head", "elf_attn.q"])
def test_unknown_targets_are_named(target: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora.targets names '{target}', which is no linear layer of a block; choose from q, k, v, o"):
        adapted_layers(("q", target))
    with pytest.raises(ConfigError, match="targets is empty"):
        adapted_layers(())


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (-2, 1.0), (2.5, 1.0), (2, 0.0), (2, float("nan"))])
def test_adapters_without_rank_or_strength(rank: int, alpha: float) -> None:
    with pytest.raises(ConfigError, match="rank"):
        attach(tiny_net(), LAYERS, roles=ROLES, rank=rank, alpha=alpha)


def test_a_role_that_the_network_lacks() -> None:
    """It had no parameters and an empty state dict."""
    with pytest.raises(ConfigError, match="no adapters of role 'teacher'; the network has student, fake_score"):
        AdaptedNet(adapted(), "teacher")


def test_the_largest_rank_is_that_of_the_smallest_layer() -> None:
    config = tiny_config(ffn_dim=40)
    assert largest_rank(("self_attn.q",), config) == config.dim == 64
    assert largest_rank(LAYERS, config) == 40
