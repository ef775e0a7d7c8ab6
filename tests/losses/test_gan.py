"""Losses of logits and R1 against closed forms: linear and quadratic discriminators, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.losses.gan import (
    approximate_r1,
    exact_r1,
    fake_loss,
    gan_critic_loss,
    gan_generator_loss,
    generator_loss,
    real_loss,
)
from rcm.losses.term import LossTerm, together

F64 = torch.float64
SHAPE = (3, 2, 4, 3, 3)
SIZE = math.prod(SHAPE[1:])
LOGITS = torch.tensor([[0.0], [2.0], [-0.5]], dtype=F64)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def log1pexp(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("form", "real", "fake", "generator"),
    [
        ("softplus", lambda d: log1pexp(-d), log1pexp, lambda d: log1pexp(-d)),
        ("hinge", lambda d: max(0.0, 1 - d), lambda d: max(0.0, 1 + d), lambda d: -d),
    ],
)
def test_losses_of_logits(form, real, fake, generator):
    for found, told in ((real_loss, real), (fake_loss, fake), (generator_loss, generator)):
        assert found(LOGITS, form).flatten().tolist() == pytest.approx([told(d) for d in (0.0, 2.0, -0.5)], rel=1e-14)


def test_a_generator_that_is_seen_through_still_moves():
    """Non-saturating: at a logit of -20 the slope is -1, where log(1 - sigmoid) would have none."""
    logits = torch.tensor([[-20.0]], dtype=F64, requires_grad=True)
    generator_loss(logits, "softplus").sum().backward()
    assert logits.grad.item() == pytest.approx(-1, abs=1e-8)


def test_exact_r1_of_a_linear_and_of_a_quadratic_discriminator():
    """D = a.y: |a|^2 everywhere, gradient 2 a in the weights. D = y.A y / 2 with A symmetric:
    |A y|^2, gradient A y y^T + y y^T A in A.
    """
    y = rand(*SHAPE).requires_grad_()
    a = rand(SIZE, seed=1).requires_grad_()
    r1 = exact_r1((y.flatten(1) @ a).unsqueeze(1), y)
    assert r1.shape == (3, 1)
    torch.testing.assert_close(r1, (a.detach() ** 2).sum().expand(3, 1))
    torch.testing.assert_close(torch.autograd.grad(r1.mean(), a)[0], 2 * a.detach())
    half = rand(SIZE, SIZE, seed=2)
    square = (half + half.T).requires_grad_()
    flat = y.flatten(1)
    r1 = exact_r1((flat @ square * flat).sum(1, keepdim=True) / 2, y)
    there, matrix = flat.detach(), square.detach()
    torch.testing.assert_close(r1.squeeze(1), (there @ matrix).square().sum(1))
    outer = there.unsqueeze(2) * there.unsqueeze(1)
    expected = (matrix @ outer + outer @ matrix).mean(0)
    torch.testing.assert_close(torch.autograd.grad(r1.mean(), square)[0], expected)


def test_approximate_r1_of_a_linear_discriminator_is_unbiased():
    """(a.eps)^2 whatever sigma, whose mean over eps is |a|^2 and its variance 2 |a|^4."""
    a, y, eps = rand(SIZE, seed=1), rand(SIZE), rand(4000, SIZE, seed=3)
    logit, found = (y @ a).expand(4000, 1), {}
    for sigma in (1e-3, 0.1, 2.0):
        found[sigma] = approximate_r1(logit, ((y + sigma * eps) @ a).unsqueeze(1), sigma=sigma)
        torch.testing.assert_close(found[sigma].squeeze(1), (eps @ a) ** 2, rtol=1e-6, atol=1e-6)
    norm = (a**2).sum().item()
    assert abs(found[0.1].mean().item() - norm) < 3 * norm * (2 / 4000) ** 0.5


def test_approximate_r1_tends_to_the_exact_one():
    """D = y.A y / 2: (eps.A y + sigma eps.A eps / 2)^2, in the mean
    |A y|^2 + sigma^2 ((tr A)^2 / 4 + |A|^2 / 2).
    """
    half, y, eps = rand(8, 8, seed=2), rand(8), rand(200_000, 8, seed=3)
    a = half + half.T

    def logit(x: torch.Tensor) -> torch.Tensor:
        return (x @ a * x).sum(-1, keepdim=True) / 2

    exact = (a @ y).square().sum().item()
    for sigma in (0.5, 0.05):
        mean = approximate_r1(logit(y).expand(200_000, 1), logit(y + sigma * eps), sigma=sigma).mean().item()
        bias = sigma**2 * (a.trace().item() ** 2 / 4 + (a**2).sum().item() / 2)
        assert mean == pytest.approx(exact + bias, rel=0.02)


def test_the_discriminators_loss_and_what_it_logs():
    """Right are one of three real ones and one of three generated ones; R1 counts gamma / 2."""
    r1 = torch.tensor([[1.0], [2.0], [6.0]], dtype=F64)
    fake = LOGITS.flip(0) + 0.25
    whole = gan_critic_loss(LOGITS, fake, r1, loss_scale=0.5, gamma=4.0)
    plain = gan_critic_loss(LOGITS, fake, None, gamma=4.0)
    assert whole.value.item() == pytest.approx(0.5 * (plain.value.item() + 2 * 3.0), rel=1e-14)
    halves = (log1pexp(0) + log1pexp(-2) + log1pexp(0.5), log1pexp(0.25) + log1pexp(2.25) + log1pexp(-0.25))
    assert plain.value.item() == pytest.approx(sum(halves) / 3)
    told = {key: value.item() for key, value in whole.logs.items()}
    means = {"gan/logit_real": 0.5, "gan/logit_fake": 0.75, "gan/r1": 3, "gan/right": 1 / 3}
    assert told == pytest.approx({**means, "gan_d/nonfinite_samples": 0})


def test_generator_term_carries_a_given_gradient_and_adds_up_over_frames():
    generated, gradient = rand(*SHAPE).requires_grad_(), rand(*SHAPE, seed=5)
    loss = LOGITS.abs()
    term = gan_generator_loss(generated, gradient, loss, loss_scale=7.0)
    assert term.value.item() == pytest.approx(7 * 2.5 / 3)
    torch.testing.assert_close(torch.autograd.grad(term.value, generated)[0], 7 * gradient / 3)
    parts = [
        gan_generator_loss(generated[:, :, cut], gradient[:, :, cut], share * loss, loss_scale=7.0).value
        for cut, share in ((slice(0, 1), 0.25), (slice(1, 4), 0.75))
    ]
    assert sum(parts).item() == pytest.approx(term.value.item(), rel=1e-14)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), generated)[0], 7 * gradient / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stops_or_leaves_its_sample_out(bad):
    broken, r1 = LOGITS.clone(), torch.ones(3, 1, dtype=F64)
    broken[1] = bad
    gradient, generated = rand(*SHAPE), rand(*SHAPE).requires_grad_()
    gradient[1, 0, 0, 0, 0] = bad
    for build, key in (
        (lambda how: gan_critic_loss(broken, LOGITS, r1, nonfinite=how), "gan_d"),
        (lambda how: gan_critic_loss(LOGITS, broken, r1, nonfinite=how), "gan_d"),
        (lambda how: gan_critic_loss(LOGITS, LOGITS, broken, gamma=1.0, nonfinite=how), "gan_d"),
        (lambda how: gan_generator_loss(generated, gradient, LOGITS, nonfinite=how), "gan_g"),
        (lambda how: gan_generator_loss(generated, rand(*SHAPE), broken, nonfinite=how), "gan_g"),
    ):
        quiet = build("zero_sample")
        assert quiet.value.isfinite() and quiet.logs[f"{key}/nonfinite_samples"] == 1
        assert not build("propagate").value.isfinite()


def test_terms_of_one_graph_are_one_term():
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (2.0, 3.0))
    both = together(LossTerm("p", 2 * a, {"p/x": a.detach()}), LossTerm("q", a * b))
    assert both.name == "p+q" and both.value.item() == 10
    assert {k: v.item() for k, v in both.logs.items()} == {"loss/p": 4, "p/x": 2, "loss/q": 6}
    both.value.backward()
    assert (a.grad, b.grad) == (5, 2)


def test_unknown_form_and_other_shapes():
    with pytest.raises(ConfigError, match="choose from softplus, hinge"):
        real_loss(LOGITS, "wgan")
    with pytest.raises(ValueError, match="shapes must agree"):
        approximate_r1(LOGITS, LOGITS[:1], sigma=0.1)
    with pytest.raises(ValueError, match="shapes must agree"):
        gan_generator_loss(rand(*SHAPE), rand(*SHAPE)[:, :, :1], LOGITS)
