"""Learning-rate factors and optimiser settings."""

from __future__ import annotations

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.train.optim import AdamWConfig, LambdaLinear


def test_factor_is_a_pure_function_of_the_update() -> None:
    """The release's default: from 1e-6 to 1 over 100 updates, then constant."""
    plan = LambdaLinear()
    assert plan.factor(0) == 1e-6
    assert plan.factor(50) == pytest.approx(0.5, abs=1e-6)
    assert plan.factor(99) < 1.0 == plan.factor(100) == plan.factor(10**6)
    down = LambdaLinear(warm_up_steps=10, f_start=0.0, f_max=2.0, f_min=0.5, cycle_length=110)
    assert [down.factor(n) for n in (0, 5, 10, 60, 110, 500)] == [0.0, 1.0, 2.0, 1.25, 0.5, 0.5]
    assert LambdaLinear(warm_up_steps=0).factor(0) == 1.0


def test_adamw_takes_trainable_parameters_only_and_decays_them_all() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    net[0].bias.requires_grad_(False)
    optimizer = AdamWConfig(lr=0.5, weight_decay=0.2, betas=(0.0, 0.999)).build(net.parameters())
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 3 and group["betas"] == (0.0, 0.999) and group["fused"]
    before = net[1].weight.detach().clone()
    for p in group["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(net[1].weight.detach(), before * (1 - 0.5 * 0.2))


@pytest.mark.parametrize(
    ("build", "knob"),
    [
        (lambda: AdamWConfig(lr=0.0), "lr=0.0 must be positive"),
        (lambda: AdamWConfig(betas=(0.9, 1.0)), r"betas\[1\]=1.0"),
        (lambda: AdamWConfig(weight_decay=-1), "weight_decay=-1"),
        (lambda: LambdaLinear(warm_up_steps=-1), "warm_up_steps"),
        (lambda: LambdaLinear(warm_up_steps=10, cycle_length=10), "cycle_length"),
        (lambda: AdamWConfig().build(torch.nn.Linear(1, 1).requires_grad_(False).parameters()), "frozen"),
    ],
)
def test_impossible_settings_name_the_knob(build, knob: str) -> None:
    with pytest.raises(ConfigError, match=knob):
        build()
