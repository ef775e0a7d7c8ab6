from __future__ import annotations

import math
import time

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.worlds.toy_codec import ToyCodec
from rcm.worlds.toy_world import COLOURS, DIRECTIONS, SHAPES, Scenes, ToyWorld, ToyWorldConfig

HARD = ToyWorldConfig(
    num_shapes=2, turns=1, colours=tuple(COLOURS), directions=tuple(DIRECTIONS), boundary="bounce", height=24, width=32, start_grid=0
)


def one_scene(colour: int, shape: int, start: tuple[float, float], direction: int) -> Scenes:
    return Scenes(torch.tensor([[colour]]), torch.tensor([[shape]]), torch.tensor([[start]]), torch.tensor([[[direction]]]))


@pytest.mark.parametrize("config", [ToyWorldConfig(), HARD])
def test_scene_depends_on_its_number_alone(config):
    world = ToyWorld(config)
    whole, part = world.scenes(40, seed=3), world.scenes(7, seed=3, first=21)
    for name in ("colour", "shape", "start", "direction"):
        assert torch.equal(getattr(whole, name)[21:28], getattr(part, name)), name
    assert not torch.equal(whole.start, world.scenes(40, seed=4).start)


def test_every_factor_occurs_evenly():
    world = ToyWorld()
    scenes = world.scenes(4800, seed=0)
    for values, kinds in ((scenes.colour, 4), (scenes.shape, 3), (scenes.direction.flatten(1), 4)):
        share = torch.bincount(values.flatten(), minlength=kinds) / len(scenes)
        assert (share - 1 / kinds).abs().max() < 0.03
    assert (scenes.start.mean(dim=(0, 1)) - 3).abs().max() < 0.1  # of 0, 2, 4, 6


def test_red_circle_moving_left_is_that():
    world = ToyWorld(ToyWorldConfig(shapes=SHAPES))
    scenes = one_scene(0, 1, (4.0, 4.0), 0)
    assert world.captions(scenes) == ["a red circle moving left"]
    video = world.render(scenes)[0]
    assert video.shape == (3, 17, 8, 8)
    assert torch.allclose(video[:, 0, 4, 4], torch.tensor([0.9, -0.4, -0.4]))
    assert torch.allclose(video[:, 0, 0, 0], torch.tensor(-0.9))
    for frame in range(1, 17):  # one pixel to the left per frame, around the torus
        assert torch.allclose(video[:, frame], video[:, 0].roll(-frame, dims=-1), atol=1e-6)


def test_starts_lie_on_the_grid_and_fill_it():
    starts = ToyWorld().scenes(400, seed=0).start.flatten(0, 1)
    assert set(starts.flatten().tolist()) == {0.0, 2.0, 4.0, 6.0}
    assert len({tuple(s) for s in starts.tolist()}) == 16
    anywhere = ToyWorld(ToyWorldConfig(start_grid=0)).scenes(400, seed=0).start
    assert len(anywhere.flatten().unique()) > 700 and anywhere.max() > 7.9


def test_the_same_picture_at_another_resolution():
    """Every fourth-of-a-frame of a 16x16 world averages to the default one."""
    small, large = ToyWorld(), ToyWorld(ToyWorldConfig.at_size(16, 16))
    a, b = small.scenes(20, seed=0), large.scenes(20, seed=0)
    assert torch.allclose(2 * a.start, b.start)
    halved = large.render(b).unflatten(-1, (8, 2)).unflatten(-3, (8, 2)).mean(dim=(-1, -3))
    assert (halved - small.render(a)).abs().mean() < 0.02


@pytest.mark.parametrize("shape", ["square", "circle", "triangle", "cross"])
def test_shapes_have_equal_area_and_true_outline(shape):
    """Coverage against a count of sub-pixel samples inside the outline."""
    world = ToyWorld(ToyWorldConfig(height=32, width=32, radius=6.0, shapes=SHAPES))
    mask = world.coverage(torch.tensor([16.3, 15.6]), shape)
    assert abs(float(mask.sum()) / (math.pi * 36) - 1) < 0.02
    sub = (torch.arange(32 * 8) + 0.5) / 8
    x, y = sub[None, :] - 16.3, sub[:, None] - 15.6
    if shape == "square":
        inside = torch.maximum(x.abs(), y.abs()) < 6 * math.sqrt(math.pi) / 2
    elif shape == "circle":
        inside = x * x + y * y < 36
    elif shape == "cross":  # five squares
        arm = math.sqrt(math.pi * 36 / 5)
        inside = ((x.abs() < 1.5 * arm) & (y.abs() < arm / 2)) | ((y.abs() < 1.5 * arm) & (x.abs() < arm / 2))
    # equilateral, apex up: side a has area sqrt(3) / 4 a^2 and its centroid a third of the height
    # above the base
    else:
        side = math.sqrt(math.pi * 36 * 4 / math.sqrt(3))
        height = side * math.sqrt(3) / 2
        inside = (y < height / 3) & (x.abs() < (y + 2 * height / 3) / height * side / 2)
    truth = inside.float().view(32, 8, 32, 8).mean(dim=(1, 3))
    assert (mask - truth).abs().max() < 0.3
    assert (mask - truth).abs().mean() < 0.006


def test_bouncing_shapes_stay_inside_and_keep_their_speed():
    world = ToyWorld(ToyWorldConfig(boundary="bounce", num_frames=65, height=20, width=24, radius=4.0, start_grid=0))
    scenes = world.scenes(64, seed=0)
    path = world.trajectory(scenes)
    low, span = world.start_range()
    assert (path >= low - 1e-4).all() and (path <= low + span + 1e-4).all()
    length = (path[:, :, 1:] - path[:, :, :-1]).norm(dim=-1)
    assert float(length.max()) < 1 + 1e-4 and float(length.median()) > 0.99
    assert torch.allclose(path[:, :, 0], scenes.start, atol=1e-5)


def test_turns_happen_at_equal_intervals_and_last_action_goes_on():
    world = ToyWorld(ToyWorldConfig(turns=1))
    scenes = world.scenes(50, seed=0)
    actions = world.actions(scenes, num_frames=33)
    assert actions.shape == (50, 1, 32)
    assert (actions[..., :8] == scenes.direction[..., :1]).all()
    assert (actions[..., 8:] == scenes.direction[..., 1:]).all()
    assert (scenes.direction[..., 0] != scenes.direction[..., 1]).all()
    assert " then " in world.captions(scenes)[0]


@pytest.mark.parametrize("config", [ToyWorldConfig(), ToyWorldConfig(turns=2), HARD])
def test_captions_parse_back(config):
    world = ToyWorld(config)
    scenes = world.scenes(30, seed=1)
    back = world.parse(world.captions(scenes))
    assert torch.equal(back.colour, scenes.colour)
    assert torch.equal(back.shape, scenes.shape)
    assert torch.equal(back.direction, scenes.direction)
    assert (scenes.colour.sort(dim=1).values.diff(dim=1) > 0).all()


def test_prompts_are_all_captions():
    world = ToyWorld()
    assert len(world.prompts()) == len(set(world.prompts())) == 48
    assert set(world.captions(world.scenes(3000, seed=0))) == set(world.prompts())


@pytest.mark.parametrize(
    "sentence",
    [
        "a purple cross moving left",
        "a red cross",
        "",
        "a red cross moving left then up",
        "a red cross moving left and a blue square moving up",
    ],
)
def test_foreign_sentences_are_refused(sentence):
    with pytest.raises(ConfigError, match="caption"):
        ToyWorld().parse([sentence])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"colours": ("red", "puce")}, "colours"),
        ({"shapes": ()}, "shapes"),
        ({"directions": ("left", "left")}, "directions"),
        ({"boundary": "portal"}, "boundary"),
        ({"num_shapes": 5}, "num_shapes"),
        ({"turns": 16}, "turns"),
        ({"radius": 2.6}, "radius"),
        ({"start_grid": -1.0}, "start_grid"),
        ({"speed": float("nan")}, "speed=nan must be a finite number"),
        ({"speed": -1.0}, "speed=-1.0 must be positive"),
        ({"num_frames": 17.5}, "num_frames=17.5 must be a whole number"),
        ({"background": 5.0}, "background=5.0 must be at most 1"),
    ],
)
def test_impossible_worlds_are_refused(settings, word):
    with pytest.raises(ConfigError, match=word):
        ToyWorldConfig(**settings)


def test_any_number_of_frames_begins_as_more_do():
    world = ToyWorld()
    scenes = world.scenes(2, seed=0)
    assert torch.equal(world.render(scenes, num_frames=1), world.render(scenes)[:, :, :1])
    with pytest.raises(ConfigError, match="num_frames=0 must be at least 1"):
        world.render(scenes, num_frames=0)


def test_a_data_set_is_made_in_seconds():
    """4096 videos, rendered and encoded, within ten seconds on one core: a quarter of them here,
    with room for a busy machine.
    """
    world, codec, begin = ToyWorld(), ToyCodec(), time.process_time()
    for first in range(0, 1024, 128):
        codec.encode(world.render(world.scenes(128, seed=0, first=first)))
    assert time.process_time() - begin < 2.5
