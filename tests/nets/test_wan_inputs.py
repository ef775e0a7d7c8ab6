"""What a forward is given and cannot be right: one sentence each, where some would have been
broadcast, cast or read past their end.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.gan_head import Taps
from rcm.nets.layout import TokenLayout
from tests.support.tiny_nets import GRID, condition, latents, tiny_net

FP64 = Precision.preset("fp64")
LAYOUT = TokenLayout.bidirectional(3, grid=GRID)
TIME = torch.tensor([[0.7], [0.2]], dtype=torch.float64)
PLAIN, IMAGES = tiny_net(), tiny_net(image_branch=True, in_dim=6)
TEXT, IMAGE, CONCAT = condition(PLAIN.config), condition(IMAGES.config), latents(3, channels=2)


def velocity(net, x, cond, *, t=TIME, layout=LAYOUT, **options):
    return Denoiser(net, FP64).velocity(x, t, cond, layout, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    ("net", "x", "cond", "message"),
    [
        (PLAIN, latents(3)[:0], replace(TEXT, text=TEXT.text[:0]), r"x must be \[B >= 1"),
        (PLAIN, latents(3).long(), TEXT, "x is torch.int64, expected latents"),
        (PLAIN, latents(3), Condition(TEXT.text.long()), "text is torch.int64, x torch.float64"),
        (PLAIN, latents(3), Condition(TEXT.text[:, 0]), r"text must be \[B, <= 8, 24\]"),
        (IMAGES, latents(3), replace(IMAGE, concat=CONCAT[:1]), r"concat must be \[2, C, T, 4, 6\]"),
        (IMAGES, latents(3), replace(IMAGE, concat=CONCAT[:, :, 0]), r"concat must be \[2, C, T, 4, 6\]|in_dim"),
        (IMAGES, latents(3), replace(IMAGE, concat=CONCAT[..., :2]), r"concat must be \[2, C, T, 4, 6\]"),
        (IMAGES, latents(3), replace(IMAGE, concat=CONCAT, image=IMAGE.image[:1]), r"image tokens must be \[2, L, 40\]"),
        (IMAGES, latents(3), replace(IMAGE, concat=CONCAT, image=IMAGE.image[..., 1:]), r"image tokens must be \[2, L, 40\]"),
        (PLAIN, latents(3), replace(TEXT, prepared=PLAIN.prepare(TEXT).prepared[:1]), "prepared for 2 samples by a network of 1 blocks"),
        (PLAIN, latents(3), replace(TEXT, prepared=PLAIN.prepare(Condition(TEXT.text[:1])).prepared), "prepared for 1 samples"),
    ],
)
def test_inputs_that_would_be_broadcast_or_cast(net, x, cond, message):
    with pytest.raises((ValueError, TypeError), match=message):
        velocity(net, x, cond)


@pytest.mark.parametrize(
    ("net", "cond", "message"),
    [
        (PLAIN, Condition(TEXT.text.repeat(1, 2, 1)), r"text must be \[B, <= 8, 24\]"),
        (PLAIN, Condition(TEXT.text[..., 1:]), r"text must be \[B, <= 8, 24\]"),
        (IMAGES, Condition(IMAGE.text), "image tokens are missing"),
    ],
)
def test_conditions_that_cannot_be_prepared(net, cond, message):
    """Of a longer text the end was cut off."""
    with pytest.raises(ValueError, match=message):
        Denoiser(net, FP64).prepare(cond)


@torch.no_grad()
def test_a_cache_of_another_network_batch_or_dtype():
    """The first one was committed with a layer that nothing had written."""
    d, frame, layout = Denoiser(PLAIN, FP64), latents(1), TokenLayout.over_cache((0,), grid=GRID, context_tokens=0)
    for layers in (1, 3):
        cache = d.new_cache(num_frames=2, grid=GRID)
        with pytest.raises(ValueError, match=f"the cache has 2 layers, the network {layers} blocks"):
            velocity(tiny_net(num_layers=layers), frame, TEXT, layout=layout, cache=cache.append())
        assert cache.num_chunks == 0
    with pytest.raises(TypeError, match="view made for this forward"):
        velocity(PLAIN, frame, TEXT, layout=layout, cache=cache)
    velocity(PLAIN, frame, TEXT, layout=layout, cache=cache.append())
    after = TokenLayout.over_cache((1,), grid=GRID, context_tokens=cache.num_tokens)
    one = {"t": TIME[:1], "layout": after}
    for view in (cache.readonly, cache.append, lambda: cache.readonly(transient=True)):
        with pytest.raises(ValueError, match=r"the cache holds \(2, \d+, 4, 16\) torch.float64, got \(1, 6, 4, 16\)"):
            velocity(PLAIN, frame[:1], Condition(TEXT.text[:1]), cache=view(), **one)
    single = Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32"))
    with pytest.raises(ValueError, match="float64, got .* torch.float32"):
        single.velocity(frame, TIME, TEXT, after, cache=cache.readonly())


def test_an_autocast_around_it_changes_no_number():
    """Times and norms would be computed in bfloat16; gradients and prepared parts, too."""
    d, x, t, cond = Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32")), latents(3), TIME, TEXT

    def numbers() -> list[torch.Tensor]:
        v = d.velocity(x, t, cond, LAYOUT)
        with torch.no_grad():
            prepared = d.velocity(x, t, d.prepare(cond), LAYOUT)
            rows = d.time_rows(t)
        return [v, prepared, *rows, *torch.autograd.grad(v.square().sum(), list(d.net.parameters()))]

    expected = numbers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = d.velocity(x, t, cond, LAYOUT)
        with torch.no_grad():
            found = [v, d.velocity(x, t, d.prepare(cond), LAYOUT), *d.time_rows(t)]
    found += torch.autograd.grad(v.square().sum(), list(d.net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_taps_are_blocks_of_the_network():
    """Others would hand out nothing, and the head would read nothing."""
    for blocks in ((), (2,), (-1,), (1, 0), (0, 0)):
        with pytest.raises(ValueError, match="must be blocks of 0 to 1, rising"):
            Denoiser(PLAIN, FP64).velocity_and_tokens(latents(3), TIME, TEXT, LAYOUT, Taps(blocks))


def test_guidance_is_a_finite_number():
    for scale in (float("nan"), float("inf"), "3", True):
        with pytest.raises(ConfigError, match="guidance scale=.* must be a finite number"):
            Guided(Denoiser(PLAIN, FP64), TEXT, scale)


def test_numbers_of_a_condition_that_are_no_floats_stay_what_they_are():
    """An action's index beyond 256 has no bfloat16 of its own."""
    cond = replace(TEXT, image=torch.tensor([[300], [301]])).to(dtype=torch.bfloat16)
    assert cond.text.dtype == torch.bfloat16 and cond.image.tolist() == [[300], [301]]
