"""What a session refuses when it is opened, and not later: a generator that another one draws from,
schedules that cannot be walked.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.nets.denoiser import Denoiser
from rcm.pipelines.course import lease
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.recipe import SamplingRecipe
from tests.pipelines.test_session import latents
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.8, 0.5), (0.5,)))


def spec(recipe: SamplingRecipe = RECIPE, **options) -> StreamSpec:
    return StreamSpec(recipe, (4, HEIGHT, WIDTH), **options)


def opened(denoiser: Denoiser, wanted: StreamSpec) -> Session:
    return Session(denoiser, None, condition(tiny_config(), batch=1), wanted)


def test_sessions_do_not_take_draws_from_each_other(denoiser):
    """A generator serves one session at a time, by whatever way a second would draw from it; one
    that has ended or is closed lets it go.
    """
    shared = torch.Generator().manual_seed(1)
    options = {"num_frames": 3, "noise": "video"}
    wanted = spec(generator=shared, **options)
    first = opened(denoiser, wanted)
    held = first.snapshot()
    with pytest.raises(ConfigError, match="generator= draws for another session"):
        opened(denoiser, wanted)
    alone = opened(denoiser, spec(generator=torch.Generator().manual_seed(1), **options))
    assert torch.equal(latents(first), latents(alone)), "the refused one drew nothing"
    with opened(denoiser, wanted):
        for draw in (first.restart, lambda: first.restart(seed=4), lambda: first.restore(held)):
            with pytest.raises(ConfigError, match="generator= draws for another session"):
                draw()
    first.restore(held)
    with pytest.raises(ConfigError, match="generator= draws noise='video' only"):
        spec(generator=shared, num_frames=3)


def test_a_generator_need_not_take_weak_references():
    """Those of torch 2.11 do not."""

    class Generator:
        __slots__ = ()

    class Stream:
        may_draw = True

    shared, first, second = Generator(), Stream(), Stream()
    lease(shared, first)
    with pytest.raises(ConfigError, match="for another session"):
        lease(shared, second)
    del first
    lease(shared, second)


def test_a_session_that_cannot_be_opened_lets_its_generator_go(denoiser):
    """While its error is at hand, too, which keeps the half-made session alive."""
    wanted = spec(generator=torch.Generator().manual_seed(1), num_frames=3, noise="video")
    with (
        patch("rcm.nets.denoiser.obstacle", lambda *_, **__: "this card is a toaster"),
        pytest.raises(ConfigError, match="toaster") as kept,
    ):
        opened(denoiser, replace(wanted, attention="fp8"))
    alone = opened(denoiser, replace(wanted, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(latents(opened(denoiser, wanted)), latents(alone)), f"in spite of {kept}"


def test_schedules_are_checked_when_a_session_is_opened(denoiser):
    """All entries of it, and those of a recipe that is taken up later, before the stream
    changes.
    """
    recipe = replace(RECIPE, mids=((0.8, 0.5), (0.9995,)), sigma_max=1600.0)
    with pytest.raises(ConfigError, match="must decrease strictly"):
        spec(recipe, num_frames=4)
    session = opened(denoiser, spec(num_frames=4))
    before = session.spec
    with pytest.raises(ConfigError, match="must decrease strictly"):
        session.set_recipe(recipe)
    assert session.spec is before


def test_what_a_stream_under_way_cannot_change_is_not_passed_over(denoiser):
    session = opened(denoiser, spec(num_frames=4))
    for other in ({"window": 2}, {"window": 2, "sinks": 1}, {"kind": "ode"}, {"guidance": 2.0}):
        with pytest.raises(ConfigError, match=f"keeps its {next(iter(other))}="):
            session.set_recipe(replace(RECIPE, **other))


@pytest.mark.parametrize("noise", ["chunk", "video"])
def test_a_device_that_cannot_draw_is_refused_when_a_session_is_opened(denoiser, noise):
    for device in ("toaster", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ConfigError, match=f"draw_on='{device}' is no device that draws random numbers here; use 'cpu'"):
            opened(denoiser, spec(num_frames=3, noise=noise, draw_on=device))
