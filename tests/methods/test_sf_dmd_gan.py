"""The adversarial term of self-forced DMD on tiny networks, float64: gradients against finite
differences and against what is put together by hand, replay, images, adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.core.rng import StepRng
from rcm.data.batch import LatentBatch
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.interpolant import rf_noise
from rcm.diffusion.time_sampling import UniformShift
from rcm.losses.gan import exact_r1
from rcm.methods.adversary import R1, Adversary
from rcm.methods.base import Phase
from rcm.methods.schedule import Alternation
from rcm.methods.sf_dmd import SelfForcedDMD
from rcm.methods.teacher_forcing import TeacherForcing
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.nets.gan_head import GanHead, Taps
from rcm.nets.layout import TokenLayout
from rcm.nets.lora import AdaptedNet, attach
from rcm.rollout.plan import StepSchedule
from tests.support.tiny_nets import GRID, PATTERNS, condition, latents, tiny_config, tiny_net

FP64, RNG = Precision.preset("fp64"), StepRng(0, 7, 0)
STUDENT, CRITIC = Phase("student", 2, 12), Phase("fake_score", 0, 1, ("gan_head",))


def head(taps: int = 2) -> GanHead:
    """A head that says something."""
    made, generator = GanHead(64, taps=taps, hidden=6).double(), torch.Generator().manual_seed(9)
    for p in made.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return made


def method(name: str = "c3-3", *, schedule=((5 / 6,), ()), dmd: float = 1.0, replayed: bool = False, sizes: dict | None = None, **options):
    nets = (tiny_net(seed=seed, attention="reference", **(sizes or {})) for seed in (1, 2, 3))
    student, teacher, fake = (Denoiser(net, FP64) for net in nets)
    settings = {"blocks": (0, 1), "loss_scale": 0.3, "loss_scale_critic": 0.7, **options}
    return SelfForcedDMD(
        student,
        teacher.eval_params(),
        fake,
        forcing=TeacherForcing(BlockPattern.parse(name)),
        schedule=StepSchedule(schedule),
        law=UniformShift(5.0),
        alternation=Alternation(6),
        loss_scale=dmd,
        replayed=replayed,
        adversary=Adversary(fake, head(len(settings["blocks"])), **settings),
    )


def batch(frames: int = 6) -> LatentBatch:
    return LatentBatch(latents(frames), condition(tiny_config()).text, ["a", "b"], ["0", "1"])


def back(m, phase: Phase, data: LatentBatch) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Gradients by role, and logs as the training step adds them up."""
    for net in m.trainable.values():
        net.zero_grad()
    logs: dict[str, float] = {}
    for thunk in m.terms(phase, data, RNG):
        term = thunk()
        term.value.backward()
        for key, value in {f"loss/{term.name}": term.value.detach(), **term.logs}.items():
            logs[key] = logs.get(key, 0.0) + float(value)
    grads = {role: {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None} for role, net in m.trainable.items()}
    return grads, logs


def looked(m, y: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Logits of a noised video, by a pass of all blocks."""
    layout, taps = TokenLayout.bidirectional(y.shape[2], grid=GRID), Taps(m.adversary.blocks)
    return m.adversary.head(m.fake_score.velocity_and_tokens(y, t, cond, layout, taps)[1])


def drawn(purpose: str, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=RNG.generator(purpose))


def times(purpose: str) -> Tensor:
    return UniformShift(5.0).sample((2, 1), generator=RNG.generator(purpose))


@pytest.mark.parametrize("form", ["softplus", "hinge"])
def test_the_students_gradient_is_that_of_finite_differences(form):
    """One block in one step, so that nothing of the rollout is cut off: the generator's loss along
    a direction in the space of all weights, by fourth-order central differences.
    """
    m, data = method(schedule=((),), dmd=0.0, form=form), batch(frames=3)
    grads, logs = back(m, STUDENT, data)
    moved = {k: p for k, p in m.student.net.named_parameters() if k in grads["student"]}
    generator = torch.Generator().manual_seed(4)
    direction = {k: torch.randn(p.shape, generator=generator).double() for k, p in moved.items()}
    t, cond = times("dmd/time"), data.condition()

    @torch.no_grad()
    def loss(step: float) -> float:
        for key, p in moved.items():
            p.add_(step * direction[key])
        video = m._roll(STUDENT, cond, data.latents, RNG, grad=False).video
        for key, p in moved.items():
            p.sub_(step * direction[key])
        logits = looked(m, rf_noise(video, drawn("dmd/noise", video), t), t, cond)
        elements = video[0].numel()
        return (0.3 * elements * (F.softplus(-logits) if form == "softplus" else -logits)).mean().item()

    h = 2e-4
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    found = sum((grads["student"][key] * d).sum().item() for key, d in direction.items())
    assert found == pytest.approx(slope, rel=1e-6) and abs(slope) > 1e-3
    assert logs["loss/gan_g"] == pytest.approx(loss(0.0), rel=1e-10)
    assert not grads["fake_score"] and not grads["gan_head"], "the student's turn leaves the discriminator alone"


class Overflowing(Adversary):
    """Its gradient is infinite in one frame of the first sample."""

    def look(self, y, t, cond, layout):
        def overflow(gradient: Tensor) -> Tensor:
            return gradient.index_put((torch.tensor(0), torch.tensor(1), torch.tensor(4)), torch.tensor(torch.inf).double())

        y.register_hook(overflow)
        return super().look(y, t, cond, layout)


@pytest.mark.parametrize(("name", "kind"), [("c3-3", Adversary), ("c1-4", Adversary), ("c3-3", Overflowing)])
def test_replayed_gradients_and_logs_equal_plain_ones(name, kind):
    data = LatentBatch(latents(PATTERNS[name]), condition(tiny_config()).text, ["a", "b"], ["0", "1"])
    methods = [method(name, replayed=r, nonfinite="zero_sample") for r in (False, True)]
    for m in methods:
        m.adversary = kind(**vars(m.adversary))
    plain, replayed = (back(m, STUDENT, data) for m in methods)
    assert plain[0]["student"].keys() == replayed[0]["student"].keys()
    for key, value in plain[0]["student"].items():
        torch.testing.assert_close(replayed[0]["student"][key], value, rtol=1e-9, atol=1e-9)
    assert {"loss/sf_dmd", "loss/gan_g", "loss/sf_dmd+gan_g", "sf_dmd/pull_rms"} <= plain[1].keys()
    assert replayed[1] == pytest.approx(plain[1], rel=1e-9)
    assert plain[1]["gan_g/nonfinite_samples"] == (kind is Overflowing)


def test_dmd_and_the_discriminator_add():
    """The gradient with both is the sum of each one alone; the fake score is asked once."""
    both, dmd, gan = (back(m, STUDENT, batch())[0]["student"] for m in (method(), method(loss_scale=0.0), method(dmd=0.0)))
    for key in both:
        torch.testing.assert_close(both[key], dmd[key] + gan[key], rtol=1e-9, atol=1e-9)
    m = method()
    plain = method()
    plain.adversary = None
    assert back(plain, STUDENT, batch())[0]["student"].keys() == both.keys()
    for key, value in back(plain, STUDENT, batch())[0]["student"].items():
        torch.testing.assert_close(dmd[key], value, rtol=1e-9, atol=1e-9)
    calls = []
    m.fake_score.net.register_forward_hook(lambda *_: calls.append(1))
    back(m, STUDENT, batch())
    assert len(calls) == 1


@pytest.mark.parametrize("r1", ["exact", "approximate", "off"])
@pytest.mark.parametrize("blocks", [(0, 1), (0,)])
def test_the_critics_gradient_is_the_sum_of_its_parts(r1, blocks):
    """Regression + 0.7 (softplus(-D(real)) + gamma / 2 R1 + softplus(D(fake))), all at one time."""
    m, data = method(r1=R1(r1, 3.0, 0.2), blocks=blocks), batch()
    grads, logs = back(m, CRITIC, data)
    assert not grads["student"]
    cond, t = data.condition(), times("critic/time")
    with torch.no_grad():
        video = m._roll(CRITIC, cond, data.latents, RNG, grad=False).video
    for net in m.trainable.values():
        net.zero_grad()
    eps, real_eps = drawn("critic/noise", video), drawn("gan/noise", video)
    y, y_real = rf_noise(video, eps, t), rf_noise(data.latents, real_eps, t).requires_grad_()
    v = m.fake_score.velocity(y, t, cond, m._whole(y))
    fake, real = looked(m, y, t, cond), looked(m, y_real, t, cond)
    penalty = torch.zeros(2, 1)
    if r1 == "exact":
        penalty = exact_r1(real, y_real)
    elif r1 == "approximate":
        penalty = ((looked(m, y_real + 0.2 * drawn("gan/r1", video), t, cond) - real) / 0.2) ** 2
    judged = (F.softplus(-real) + 1.5 * penalty + F.softplus(fake)).mean()
    ((v - (eps - video)).square().mean() + 0.7 * judged).backward()
    for role in ("fake_score", "gan_head"):
        expected = {k: p.grad for k, p in m.trainable[role].named_parameters() if p.grad is not None}
        assert grads[role].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(grads[role][key], value, rtol=1e-8, atol=1e-10)
    assert logs["loss/gan_d"] == pytest.approx(0.7 * judged.item())
    assert logs["loss/fake_score"] == pytest.approx((v - (eps - video)).square().mean().item())
    right = ((real > 0).double().mean() + (fake < 0).double().mean()).item() / 2
    told = (real.mean().item(), fake.mean().item(), penalty.mean().item(), right)
    assert [logs[f"gan/{k}"] for k in ("logit_real", "logit_fake", "r1", "right")] == pytest.approx(told)


def test_no_block_runs_behind_the_last_that_real_videos_need():
    m, ran = method(blocks=(0,)), []
    for i, block in enumerate(m.fake_score.net.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    next(iter(m.terms(CRITIC, batch(), RNG)))()
    assert ran == [0, 1, 0, 0], "a generated video, a real one, and another look at it for R1"


def test_phases_name_the_head_beside_the_fake_score():
    phases = [method().phase(i) for i in range(3)]
    assert [p.roles for p in phases] == [("student",), ("fake_score", "gan_head"), ("fake_score", "gan_head")]
    assert set(method().trainable) == {"student", "fake_score", "gan_head"}


@dataclass(frozen=True)
class ImageBatch(LatentBatch):
    """Latents with what image-to-video is conditioned on."""

    concat: Tensor | None = None
    image: Tensor | None = None

    def condition(self) -> Condition:
        return Condition(self.text, self.concat, self.image)


def test_the_discriminator_sees_given_images():
    """Channels and image tokens reach both halves: other images, other logits."""
    sizes = {"in_dim": 6, "image_branch": True}
    data = batch()
    image = condition(tiny_config(**sizes)).image
    given = ImageBatch(data.latents, data.cond, data.prompts, data.keys, concat=latents(6, channels=2), image=image)
    m = method(sizes=sizes)
    assert back(m, STUDENT, given)[0]["student"]
    logs = back(m, CRITIC, given)[1]
    for other in (replace(given, concat=-given.concat), replace(given, image=-image)):
        told = back(m, CRITIC, other)[1]
        assert told["gan/logit_real"] != logs["gan/logit_real"] and told["gan/logit_fake"] != logs["gan/logit_fake"]


def test_exact_r1_through_adapters():
    """The adapters' own backward pass is differentiated again: along a direction in their factors,
    against central differences.
    """
    net: nn.Module = tiny_net(seed=3, attention="reference")
    attach(net, ("self_attn.q", "cross_attn.v", "ffn.0", "ffn.2"), roles=("fake_score",), rank=2, alpha=2.0)
    role = AdaptedNet(net, "fake_score")
    generator = torch.Generator().manual_seed(4)
    factors = [p for _, p in role.named_parameters()]
    for p in factors:
        p.data = 0.2 * torch.randn(p.shape, generator=generator).double()
    direction = [torch.randn(p.shape, generator=generator).double() for p in factors]
    denoiser, judge = Denoiser(role, FP64), head()
    y, t = latents(3).requires_grad_(), torch.full((2, 1), 0.4, dtype=torch.float64)
    layout = TokenLayout.bidirectional(3, grid=GRID)

    def penalty(step: float) -> Tensor:
        for p, d in zip(factors, direction, strict=True):
            p.data += step * d
        tokens = denoiser.velocity_and_tokens(y, t, condition(tiny_config()), layout, Taps((0, 1), True))[1]
        value = exact_r1(judge(tokens), y).mean()
        grads = torch.autograd.grad(value, factors)
        for p, d in zip(factors, direction, strict=True):
            p.data -= step * d
        return torch.stack([value.detach(), sum((g * d).sum() for g, d in zip(grads, direction, strict=True))])

    h = 1e-3
    up, down, up2, down2 = (penalty(k * h)[0] for k in (1, -1, 2, -2))
    slope = (8 * (up - down) - (up2 - down2)) / (12 * h)
    assert penalty(0.0)[1].item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"form": "aproximate"}, {"gamma": -1.0}, {"sigma": 0.0}, {"gamma": float("nan")}])
def test_a_penalty_that_is_none(wrong):
    """A form that is misspelt was no penalty at all."""
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
        R1(**wrong)
