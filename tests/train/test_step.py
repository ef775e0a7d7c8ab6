"""One step on one rank: which weights move, how terms and micro-batches add up, and what a NaN does
not do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rcm.core.errors import ConfigError, NonFinite
from rcm.core.rng import StepRng
from rcm.losses.term import LossTerm
from rcm.methods.base import Phase
from rcm.nets.lora import AdaptedNet, attach, initial_factors
from rcm.parallel.init import load_full
from rcm.parallel.mesh import ParallelDims
from rcm.train.optim import AdamWConfig, LambdaLinear
from rcm.train.state import TrainState
from rcm.train.step import StepConfig, StepReport, _rolled, run_step
from tests.support.toy_method import ToyMethod, make_loader, make_net, make_run

ONE = ParallelDims()


def step(method: ToyMethod, state: TrainState, *, micro: int = 1, config: StepConfig | None = None, stop: bool = False) -> StepReport:
    loader = make_loader(dims=ONE)
    batches = [next(loader) for _ in range(micro)]
    rngs = [StepRng(0, state.iteration, 0, m) for m in range(micro)]
    return run_step(state, method, batches=batches, rngs=rngs, dims=ONE, config=config or StepConfig(), stop=stop)


def snapshot(state: TrainState) -> dict[str, Tensor]:
    """Copies of every tensor that a step may change."""
    found = {f"{role}.{k}": v.clone() for role, slot in state.roles.items() for k, v in slot.net.state_dict().items()}
    found |= {f"ema.{k}": v.clone() for k, v in state.ema.shadow.items()}
    for role, slot in state.roles.items():
        for i, values in enumerate(slot.optimizer.state.values()):
            found |= {f"{role}.optim.{i}.{k}": v.clone() for k, v in values.items()}
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {key.split(".")[0] for key in after if key not in before or not torch.equal(before[key], after[key])}


def test_what_stays_gathered_is_as_large_as_the_whole_network() -> None:
    """Of a student of adapters the base is gathered, so the base counts."""
    net = make_net(seed=0)
    base = sum(p.numel() for p in net.parameters())
    attach(net, ["ffn.0"], roles=("student",), rank=1, alpha=1.0)
    role = AdaptedNet(net, "student")
    load_full(role, initial_factors(role, seed=0))
    state = TrainState.create({"student": role}, optim={"student": AdamWConfig()}, schedule=LambdaLinear(), ema=None)
    phase, whole = Phase("student", 0, 0, rollout=True), base + sum(p.numel() for p in role.parameters())
    assert [_rolled(state, phase, StepConfig(keep_gathered=most)) for most in (base, whole)] == [[], [role]]
    assert _rolled(state, Phase("student", 0, 0), StepConfig(keep_gathered=whole)) == []


def test_only_the_role_of_the_phase_moves_and_counts() -> None:
    method, state = make_run(dims=ONE)
    moved, rates = [], []
    for _ in range(4):
        before = snapshot(state)
        report = step(method, state)
        moved.append(changed(before, snapshot(state)))
        rates.append(report.logs[f"lr/{report.phase.role}"])
    assert moved == [{"student", "ema"}, {"student", "ema"}, {"fake_score"}, {"student", "ema"}]
    assert (state.iteration, state.roles["student"].updates, state.roles["fake_score"].updates) == (4, 3, 1)
    factor = state.roles["student"].schedule.factor
    assert rates == [1e-3 * factor(0), 1e-3 * factor(1), 1e-3 * factor(0), 1e-3 * factor(2)]
    assert all(p.grad is None for slot in state.roles.values() for p in slot.net.parameters())


def test_average_follows_the_students_own_updates() -> None:
    """Iterations 0, 1, 3 are student updates 0, 1, 2: their betas, and no change in between."""
    method, state = make_run(dims=ONE, precision="fp64")
    ema, name = state.ema, "head.head.weight"
    expected = torch.zeros(())
    for iteration in range(4):
        step(method, state)
        if iteration != 2:
            beta = ema.beta({0: 0, 1: 1, 3: 2}[iteration])
            expected = beta * expected + (1 - beta) * state.roles["student"].net.get_parameter(name).detach()
        torch.testing.assert_close(ema.shadow[name], expected, rtol=1e-13, atol=0)


def test_terms_add_and_micro_batches_average() -> None:
    """The gradient norm that is logged equals that of mean over micro-batches of the sum of terms,
    computed in one graph.
    """
    method, state = make_run(dims=ONE, precision="fp64")
    loader = make_loader(dims=ONE)
    total = 0.0
    for m in range(3):
        batch = next(loader)
        total = total + sum(thunk().value for thunk in method.terms(method.phase(0), batch, StepRng(0, 0, 0, m))) / 3
    grads = torch.autograd.grad(total, list(state.roles["student"].net.parameters()))
    expected = torch.cat([g.flatten() for g in grads]).norm().item()
    reports = {}
    for sync in ("last", "each"):
        method, state = make_run(dims=ONE, precision="fp64")
        reports[sync] = step(method, state, micro=3, config=StepConfig(gradient_sync=sync))
        assert reports[sync].logs["grad_norm/student"] == pytest.approx(expected, rel=1e-12)
    logs = reports["last"].logs
    assert float(logs["loss/flow"] + logs["loss/size"]) == pytest.approx(float(total.detach()), rel=1e-12)
    assert "flow/noise" in logs


def test_clipping_scales_to_the_norm_and_is_off_by_default() -> None:
    """SGD stands in for AdamW, whose update would not show the scale of a gradient."""
    moves = {}
    for name, config in {
        "off": StepConfig(),
        "on": StepConfig(grad_clip=True, clip_norm=0.5),
        "loose": StepConfig(grad_clip=True, clip_norm=1e6),
    }.items():
        method, state = make_run(dims=ONE, precision="fp64")
        slot = state.roles["student"]
        slot.optimizer = torch.optim.SGD(slot.net.parameters(), lr=1.0)
        slot.base_lr, slot.schedule = 1.0, type(slot.schedule)(warm_up_steps=0)
        before = torch.cat([p.detach().flatten().clone() for p in slot.net.parameters()])
        report = step(method, state, config=config)
        moves[name] = (before - torch.cat([p.detach().flatten() for p in slot.net.parameters()])).norm().item()
        assert report.logs["grad_norm/student"] > 1
    assert moves["on"] == pytest.approx(0.5, rel=1e-5)
    assert moves["off"] == pytest.approx(moves["loose"], rel=1e-12) and moves["off"] > 1


def in_loss(iteration: int, v: Tensor) -> Tensor:
    return v * float("nan") if iteration == 3 else v


class _PoisonedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * float("inf")


def in_gradient(iteration: int, v: Tensor) -> Tensor:
    return _PoisonedBackward.apply(v) if iteration == 3 else v


@pytest.mark.parametrize(("fault", "words"), [(in_loss, "loss of term flow"), (in_gradient, "gradient .all losses finite")])
def test_nan_stops_before_the_update_and_says_where(fault: Callable[[int, Tensor], Tensor], words: str) -> None:
    method, state = make_run(dims=ONE, fault=fault)
    for _ in range(3):
        step(method, state)
    before = snapshot(state)
    with pytest.raises(NonFinite, match=words) as caught:
        step(method, state)
    message = str(caught.value)
    assert "student update 2 (iteration 3)" in message
    assert (
        "arose in the term" if fault is in_loss else "nearest the output head.head.bias, nearest the input patch_embedding.weight"
    ) in message
    assert changed(before, snapshot(state)) == set()
    assert (state.iteration, state.roles["student"].updates) == (3, 2)
    assert all(p.grad is None for p in state.roles["student"].net.parameters())


def test_nan_inside_a_network_names_the_module() -> None:
    """A weight that overflows in the second block: everything after it is NaN, the message names
    where it began.
    """
    method, state = make_run(dims=ONE)
    with torch.no_grad():
        state.roles["student"].net.blocks[1].ffn[2].weight.fill_(3e38)
    with pytest.raises(NonFinite, match=r"loss of term flow, size; first non-finite output from student\.blocks\.1\.ffn\.2;"):
        step(method, state)


def test_nan_in_adapters_names_their_role() -> None:
    """Student and fake score are adapters on one base, whose modules both have."""
    base: nn.Module = make_net(seed=0)
    attach(base, ("ffn.2",), roles=("student", "fake_score"), rank=2, alpha=2.0)
    nets = {role: AdaptedNet(base, role) for role in ("student", "fake_score")}
    for net in nets.values():
        load_full(net, initial_factors(net, seed=1))
    dict(nets["fake_score"].named_parameters())["blocks.1.ffn.2.lora_B.weight"].data.fill_(torch.nan)
    method, state = ToyMethod(nets), TrainState.create(nets, optim=dict.fromkeys(nets, AdamWConfig()), schedule=LambdaLinear(), ema=None)
    step(method, state)
    state.iteration = 2
    with pytest.raises(NonFinite, match=r"first non-finite output from fake_score\.net\.blocks\.1\.ffn\.2;"):
        step(method, state)


def test_an_infinite_loss_with_finite_gradients_stops_too() -> None:
    method, state = make_run(dims=ONE)
    size = method._size
    method._size = lambda batch: LossTerm("size", size(batch).value + float("inf"))
    before = snapshot(state)
    with pytest.raises(NonFinite, match="loss of term size"):
        step(method, state)
    assert changed(before, snapshot(state)) == set()


def test_gradients_left_in_another_role_are_refused() -> None:
    def leak(iteration: int, v: Tensor) -> Tensor:
        return v + 0 * sum(p.sum() for p in method.nets["fake_score"].parameters())

    method, state = make_run(dims=ONE, fault=leak)
    with pytest.raises(RuntimeError, match="student phase left gradients in fake_score"):
        step(method, state)


def test_a_phase_without_terms_is_an_error() -> None:
    method, state = make_run(dims=ONE)
    method.terms = lambda *_: iter(())
    with pytest.raises(RuntimeError, match="no loss term"):
        step(method, state)


def test_stop_request_comes_back_and_settings_are_checked() -> None:
    method, state = make_run(dims=ONE)
    assert step(method, state, stop=True).stop and not step(method, state).stop
    with pytest.raises(ConfigError, match="gradient_sync"):
        StepConfig(gradient_sync="never")
    with pytest.raises(ConfigError, match="clip_norm"):
        StepConfig(clip_norm=0)


def test_state_needs_settings_for_known_roles() -> None:
    method, _ = make_run(dims=ONE)
    with pytest.raises(ConfigError, match="fake_score"):
        TrainState.create(method.nets, optim={"student": AdamWConfig()}, schedule=LambdaLinear(), ema=None)
    with pytest.raises(ConfigError, match="teacher"):
        TrainState.create({"teacher": method.nets["student"]}, optim={}, schedule=LambdaLinear(), ema=None)
