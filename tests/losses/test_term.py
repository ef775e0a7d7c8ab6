import dataclasses

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.time import require_same_shape
from rcm.losses.dcm import bidirectional_dcm, causal_dcm
from rcm.losses.denoising import bidirectional_critic_loss, causal_critic_loss, diffusion_loss, ode_pair_loss
from rcm.losses.dmd import dmd_loss, dmd_target
from rcm.losses.gan import gan_generator_loss
from rcm.losses.scm import normalise, scm_regression
from rcm.losses.term import LossTerm, frame_sum, sample_mean, sample_sum, screen_samples

F64 = torch.float64


def test_reductions_by_loops():
    """Different sizes on every axis: [B, C, T, H, W] = [2, 3, 4, 5, 6]."""
    x = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    for b in range(2):
        assert sample_sum(x)[b].item() == pytest.approx(sum(x[b].flatten().tolist()), rel=1e-12)
        assert sample_mean(x)[b].item() == pytest.approx(sum(x[b].flatten().tolist()) / 360, rel=1e-12)
        frames = [sum(x[b, :, f].flatten().tolist()) / (3 * 5 * 6) for f in range(4)]
        assert frame_sum(x)[b].item() == pytest.approx(sum(frames), rel=1e-12)
    for reduction in (sample_sum, sample_mean, frame_sum):
        assert reduction(x).shape == (2,)
        assert reduction(x.bfloat16()).dtype == torch.float32


def test_term_refuses_what_would_go_wrong_later():
    scalar = torch.tensor(1.0, requires_grad=True)
    term = LossTerm("a", scalar, {"a/x": torch.tensor(2.0)})
    assert LossTerm("a", scalar).logs == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        term.value = scalar
    with pytest.raises(ValueError, match=r"'a' has shape \(2,\)"):
        LossTerm("a", torch.zeros(2))
    with pytest.raises(ValueError, match="'a/x'.*detached"):
        LossTerm("a", scalar, {"a/x": scalar * 2})
    with pytest.raises(ValueError, match="'a/x'"):
        LossTerm("a", scalar, {"a/x": torch.zeros(1)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_screening(bad):
    a, b = torch.ones(3, 2, 2, 2, 2), torch.ones(3, 2, 2, 2, 2)
    a[0, 1, 0, 1, 0] = bad
    b[2, 0, 1, 0, 1] = bad
    (kept_a, kept_b), count = screen_samples("propagate", a, b)
    assert count == 2 and kept_a is a and kept_b is b
    (clean_a, clean_b), count = screen_samples("zero_sample", a, b)
    assert count == 2
    for clean in (clean_a, clean_b):
        assert torch.equal(clean.flatten(1).sum(1), torch.tensor([0.0, 16.0, 0.0]))
    _, none = screen_samples("propagate", torch.ones(2, 2))
    assert none == 0
    with pytest.raises(ConfigError, match="'skip'.*propagate, zero_sample"):
        screen_samples("skip", a)


def test_shapes_are_named():
    require_same_shape(a=torch.zeros(2, 1), b=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"a \(2, 1\), b \(2, 2\)"):
        require_same_shape(a=torch.zeros(2, 1), b=torch.zeros(2, 2))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: scm_regression(x, x),
        lambda x, t: normalise(x),
        lambda x, t: bidirectional_dcm(x, x),
        lambda x, t: causal_dcm(x, x),
        lambda x, t: diffusion_loss(x, x, x, t),
        lambda x, t: bidirectional_critic_loss(x, x, x, t),
        lambda x, t: causal_critic_loss(x, x, x),
        lambda x, t: ode_pair_loss(x, x, t),
        lambda x, t: dmd_target(x, x, x),
        lambda x, t: dmd_loss(x, x),
        lambda x, t: gan_generator_loss(x, x, t),
    ],
)
def test_channels_are_not_taken_for_samples(loss):
    """A video without its batch."""
    x, t = torch.zeros(3, 2, 4, 4), torch.full((3, 1), 0.5, dtype=F64)
    with pytest.raises(ValueError, match=r"has shape \(3, 2, 4, 4\), expected \[B, C, T, H, W\]"):
        loss(x, t)
    loss(x[None], t[:1])
