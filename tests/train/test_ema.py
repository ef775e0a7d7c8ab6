"""The power-function average against its closed form, and the swap."""

from __future__ import annotations

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.train.ema import EMAConfig, PowerEMA, exponent_to_std, std_to_exponent


def test_exponent_and_std_determine_each_other() -> None:
    """Published pairs: 0.1 and 6.94, 0.05 and 16.97 (EDM2, section 3.2); the uniform average has
    std 1/sqrt(12).
    """
    assert std_to_exponent(0.1) == pytest.approx(6.94, abs=5e-3)
    assert std_to_exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent_to_std(0.0) == pytest.approx(12**-0.5, rel=1e-12)
    for std in (0.01, 0.05, 0.1, 0.2, 0.28):
        assert exponent_to_std(std_to_exponent(std)) == pytest.approx(std, rel=1e-9)


def test_std_is_that_of_the_profile() -> None:
    """Width of tau^gamma on [0, 1] by numerical integration, not by the formula."""
    tau = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    weight = tau ** std_to_exponent(0.1)
    mean = (weight * tau).sum() / weight.sum()
    spread = ((weight * (tau - mean) ** 2).sum() / weight.sum()).sqrt()
    assert spread.item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("shift", [0, 3])
def test_average_equals_the_closed_form(shift: int) -> None:
    """Update i weighs ((i+1)^(g+1) - i^(g+1)) / (n+1)^(g+1) in the average after update n
    (telescoping product of the betas).
    """
    net = torch.nn.Linear(3, 1, bias=False).double()
    ema = PowerEMA(net, EMAConfig(rate=0.1, iteration_shift=shift))
    start = net.weight.detach().clone()
    history, n = [], 12
    for i in range(n + 1):
        with torch.no_grad():
            net.weight.copy_(torch.randn(1, 3, generator=torch.Generator().manual_seed(i)))
        history.append(net.weight.detach().clone())
        ema.update(net, index=i)
    power = std_to_exponent(0.1) + 1
    last = n + shift + 1
    expected = sum(w * ((i + shift + 1) ** power - (i + shift) ** power) for i, w in enumerate(history)) / last**power
    expected = expected + start * (shift / last) ** power
    torch.testing.assert_close(ema.shadow["weight"], expected, rtol=1e-12, atol=1e-12)


def test_first_update_copies_and_storage_is_fp32() -> None:
    net = torch.nn.Linear(2, 2).bfloat16()
    ema = PowerEMA(net, EMAConfig())
    with torch.no_grad():
        net.weight.fill_(0.7)
    assert ema.beta(0) == 0.0 and 0 < ema.beta(1) < 0.01
    ema.update(net, index=0)
    assert ema.shadow["weight"].dtype == torch.float32 and torch.equal(ema.shadow["weight"], net.weight.float())


def test_swap_puts_every_bit_back_even_after_an_error() -> None:
    net = torch.nn.Linear(4, 4).bfloat16()
    ema = PowerEMA(net, EMAConfig())
    ema.shadow["weight"].add_(1.2345)
    own, averaged = net.weight.detach().clone(), ema.shadow["weight"].clone()
    seen = []

    def fail_while_swapped() -> None:
        with ema.swapped(net):
            seen.append(net.weight.detach().clone())
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_swapped()
    assert torch.equal(seen[0], averaged.bfloat16())
    assert torch.equal(net.weight.detach(), own) and torch.equal(ema.shadow["weight"], averaged)


@pytest.mark.parametrize("rate", [0.0, -0.1, 0.3])
def test_impossible_widths_name_the_knob(rate: float) -> None:
    with pytest.raises(ConfigError, match=f"rate={rate} must be in"):
        EMAConfig(rate=rate)
    with pytest.raises(ConfigError, match="exponent"):
        exponent_to_std(-1.0)
