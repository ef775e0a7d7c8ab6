import pytest
import torch

from rcm.losses.dmd import dmd_loss, dmd_normaliser, dmd_target

F64 = torch.float64
SHAPE = (3, 2, 4, 3, 3)


def _rand(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=g, dtype=F64) for _ in range(count)]


def test_gradient_is_twice_the_normalised_score_difference():
    """dL/dG = 2 (x0_fake - x0_teacher) / max(mean |G - x0_teacher|, 1e-5) (Causal_rCM.md section
    8), then the batch mean.
    """
    generated, fake, teacher = _rand(3)
    generated.requires_grad_()
    term = dmd_loss(generated, dmd_target(generated, fake, teacher))
    (grad,) = torch.autograd.grad(term.value, generated)
    value = 0.0
    for b in range(3):
        w = (generated[b] - teacher[b]).abs().mean().item()
        direction = (fake[b] - teacher[b]) / w
        torch.testing.assert_close(grad[b], 2 * direction / 3, rtol=1e-11, atol=1e-13)
        value += (direction**2).sum().item() / 3
    assert term.value.item() == pytest.approx(value, rel=1e-11)
    (scaled,) = torch.autograd.grad(dmd_loss(generated, dmd_target(generated, fake, teacher), loss_scale=0.5).value, generated)
    torch.testing.assert_close(scaled, 0.5 * grad)


def test_a_descent_step_moves_away_from_the_fake_score():
    """G is pulled along teacher - fake: where the teacher expects more than the fake score, G
    grows.
    """
    generated, fake, teacher = _rand(3)
    target = dmd_target(generated, fake, teacher)
    assert torch.equal(torch.sign(target - generated), torch.sign(teacher - fake))


def test_normaliser_floor_and_form():
    generated, fake, _ = _rand(3)
    far = generated.clone()
    far[0] += 3.0
    far[1] -= 2e-5
    far[2] -= 1e-6
    torch.testing.assert_close(dmd_normaliser(generated, far), torch.tensor([3.0, 2e-5, 1e-5], dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(dmd_normaliser(generated, far, floor=0.5), torch.tensor([3.0, 0.5, 0.5], dtype=F64))
    equal = dmd_target(generated, fake, generated)
    torch.testing.assert_close(equal, generated - (fake - generated) / 1e-5, rtol=1e-12, atol=0)


def test_everything_but_the_generated_is_constant():
    generated, fake, teacher = (x.requires_grad_() for x in _rand(3))
    target = dmd_target(generated, fake, teacher)
    assert not target.requires_grad and not dmd_normaliser(generated, teacher).requires_grad
    dmd_loss(generated, target).value.backward()
    assert fake.grad is None and teacher.grad is None and generated.grad is not None


def test_float32_inputs_keep_a_float64_gradient():
    """G - (G - grad) in float32 would lose a small pull next to a large G."""
    generated, fake, teacher = (x.float() for x in _rand(3))
    generated = (generated + 1000).requires_grad_()
    target = dmd_target(generated, fake, teacher)
    assert target.dtype == F64
    (grad,) = torch.autograd.grad(dmd_loss(generated, target).value, generated)
    w = (generated.double() - teacher.double()).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1).detach()
    torch.testing.assert_close(grad.double(), 2 * (fake.double() - teacher.double()) / w / 3, rtol=1e-6, atol=1e-12)
    pull = generated.detach().double() - target
    torch.testing.assert_close(pull, (fake.double() - teacher.double()) / w, rtol=1e-9, atol=1e-12)


def test_replay_by_blocks_adds_up():
    """Blocks of frames against slices of one target: values and gradients sum to the whole-video
    ones.
    """
    generated, fake, teacher = _rand(3)
    generated.requires_grad_()
    target = dmd_target(generated, fake, teacher)
    whole = dmd_loss(generated, target).value
    (grad,) = torch.autograd.grad(whole, generated)
    parts = [dmd_loss(generated[:, :, i:j], target[:, :, i:j]).value for i, j in ((0, 1), (1, 4))]
    assert sum(p.item() for p in parts) == pytest.approx(whole.item(), rel=1e-12)
    (replayed,) = torch.autograd.grad(parts[0] + parts[1], generated)
    torch.testing.assert_close(replayed, grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_condemns_its_whole_sample(index, bad):
    """Whichever input it comes from, so that a replayed block sees the same casualties as the whole
    video.
    """
    tensors = _rand(3)
    tensors[index][1, 0, 2, 0, 0] = bad
    target = dmd_target(*tensors)
    bad_rows = target.isnan().flatten(1)
    assert bad_rows[1].all() and not bad_rows[0].any() and not bad_rows[2].any()
    generated = tensors[0].requires_grad_()
    assert dmd_loss(generated, target).value.isnan()
    quiet = dmd_loss(generated, target, nonfinite="zero_sample")
    (grad,) = torch.autograd.grad(quiet.value, generated)
    assert quiet.value.isfinite() and quiet.logs["dmd/nonfinite_samples"] == 1
    assert (grad[1] == 0).all() and (grad[::2] != 0).any()
    assert quiet.logs["dmd/pull_rms"].isfinite()


def test_shapes():
    generated, fake, teacher = _rand(3)
    for call in (lambda: dmd_target(generated, fake[:1], teacher), lambda: dmd_normaliser(generated, teacher[:1])):
        with pytest.raises(ValueError, match="shapes must agree"):
            call()
    with pytest.raises(ValueError, match="target"):
        dmd_loss(generated, teacher[:, :, :1])
