from __future__ import annotations

import math

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.worlds.toy_factors import FactorReader
from rcm.worlds.toy_scores import ToyScorer, expected_entropy, frechet_distance
from rcm.worlds.toy_world import COLOURS, SHAPES, Scenes, ToyWorld, ToyWorldConfig


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="module")
def scorer(world) -> ToyScorer:
    return ToyScorer(world)


@pytest.fixture(scope="module")
def truth(world) -> tuple[Scenes, torch.Tensor, list[str]]:
    """Every caption twice, with even start positions."""
    prompts = world.prompts() * 2
    told = world.parse(prompts)
    start = torch.randint(0, 4, (len(prompts), 1, 2), generator=torch.Generator().manual_seed(0)) * 2.0
    scenes = Scenes(told.colour, told.shape, start, told.direction)
    return scenes, world.render(scenes), prompts


@pytest.mark.parametrize(
    "config",
    [
        ToyWorldConfig(),
        ToyWorldConfig(start_grid=0, speed=0.7),
        ToyWorldConfig(
            shapes=SHAPES, height=16, width=16, radius=4.0, start_grid=0, colours=tuple(COLOURS), directions=("northwest", "up")
        ),
        ToyWorldConfig(boundary="bounce", height=24, width=20, radius=4.0, start_grid=0),
        ToyWorldConfig.at_size(16, 18),
        ToyWorldConfig(turns=2, contrast=0.6, background=-0.2, tint=0.2),
    ],
)
def test_reader_recovers_the_ground_truth(config):
    world = ToyWorld(config)
    scenes = world.scenes(200, seed=11)
    factors = FactorReader(world).read(world.render(scenes))
    assert torch.equal(factors.colour, scenes.colour)
    assert torch.equal(factors.shape, scenes.shape)
    size = torch.tensor([config.width, config.height])
    gap = (factors.centre - world.trajectory(scenes) + size / 2) % size - size / 2
    assert gap.abs().max() < 0.25 and gap.abs().mean() < 0.03
    assert factors.fit.min() > 0.98


def test_faint_background_noise_does_not_move_the_centre(world, truth):
    """What is fainter than the floor is background: without it, noise everywhere pulls the centroid
    to the middle and fills the mask.
    """
    scenes, video, _ = truth
    noisy = video + 0.05 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    factors = FactorReader(world).read(noisy)
    gap = (factors.centre - world.trajectory(scenes) + 4) % 8 - 4
    assert gap.abs().mean() < 0.03 and factors.purity.min() > 0.99
    assert (factors.area.mean(dim=2) / FactorReader(world).read(video).area.mean(dim=2) - 1).abs().max() < 0.03


def test_truth_scores_full_marks(scorer, truth):
    scores = scorer.score(truth[1], truth[2])
    assert (scores.colour, scores.shape, scores.direction, scores.joint) == (1, 1, 1, 1)
    assert scores.motion > 0.98 and scores.fit > 0.99 and scores.realism > 0.95 and scores.diversity > 0.85
    assert scores.score > 97
    assert set(scores.as_dict()) >= {"frechet", "joint", "score"}


def test_wrong_colour_costs_colour_alone(scorer, truth):
    scores = scorer.score(truth[1][:, [1, 2, 0]], truth[2])
    assert scores.colour < 0.3 and scores.joint < 0.3
    assert scores.shape == scores.direction == 1 and scores.motion > 0.98


def test_wrong_shape_costs_shape_alone(world, scorer, truth):
    scenes = truth[0]
    scores = scorer.score(world.render(Scenes(scenes.colour, (scenes.shape + 1) % 3, scenes.start, scenes.direction)), truth[2])
    assert scores.shape == 0 and scores.joint == 0
    assert scores.colour == scores.direction == 1


def test_reversed_time_costs_direction_alone(scorer, truth):
    scores = scorer.score(truth[1].flip(2), truth[2])
    assert scores.direction == 0 and scores.joint == 0
    assert scores.colour == scores.shape == 1 and scores.motion > 0.98


def test_shuffled_frames_cost_motion_and_realism(scorer, truth):
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    scores = scorer.score(truth[1][:, :, order], truth[2])
    assert scores.jitter > 1 and scores.motion < 0.2 and scores.realism < 0.1
    assert scores.colour == scores.shape == 1


def test_a_still_video_has_no_motion(scorer, truth):
    scores = scorer.score(truth[1][:, :, :1].expand_as(truth[1]), truth[2])
    assert scores.direction == 0 and scores.motion < 0.4 and scores.score < 55


def test_one_video_per_caption_costs_diversity(world, scorer, truth):
    """Mode collapse inside each caption, though the set as a whole is spread."""
    scenes = truth[0]
    start = torch.cat([scenes.start[:48]] * 2)
    scores = scorer.score(world.render(Scenes(scenes.colour, scenes.shape, start, scenes.direction)), truth[2])
    assert scores.diversity < 0.01 and scores.joint == 1
    same = torch.full_like(start, 4.0)
    assert scorer.score(world.render(Scenes(scenes.colour, scenes.shape, same, scenes.direction)), truth[2]).diversity < 0.01


def test_one_start_position_has_no_spread_even_when_a_little_off(world, scorer, truth):
    """Each caption once, all near one point of the start grid: the bins are centred on the grid,
    not bordered by it.
    """
    scenes = truth[0][slice(0, 48)]
    near = 2.0 + 0.1 * torch.rand(scenes.start.shape, generator=torch.Generator().manual_seed(0)) - 0.05
    video = world.render(Scenes(scenes.colour, scenes.shape, near, scenes.direction))
    assert scorer.score(video, truth[2][:48]).diversity < 0.01


def test_scores_fall_with_noise_and_nothing_scores_nothing(scorer, truth):
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(truth[1].shape, generator=generator)
    totals = [scorer.score(truth[1] + level * noise, truth[2]).score for level in (0.0, 0.2, 0.5)]
    assert totals[0] > totals[1] + 2 > totals[2] + 20
    assert scorer.score(noise, truth[2]).score < 5
    assert scorer.score(torch.full_like(noise, -0.9), truth[2]).score < 5


def test_faded_shapes_cost_fit_and_realism(scorer, truth):
    scores = scorer.score((truth[1] + 0.9) * 0.6 - 0.9, truth[2])
    assert scores.joint == 1 and scores.fit < 0.9 and scores.realism < 0.6


def test_drift_sees_decay(world, scorer, truth):
    scenes = truth[0][slice(0, 48)]
    video = world.render(scenes, num_frames=49)
    steady = scorer.drift(video, truth[2][:48])
    assert len(steady.adherence) == 3 and abs(steady.drift) < 0.5 and min(steady.adherence) > 97
    wrong = video.clone()
    wrong[:, :, 33:] = video[:, [2, 0, 1], 33:]
    assert scorer.drift(wrong, truth[2][:48]).drift < -20
    fading = scorer.drift((video + 0.9) * torch.linspace(1, 0.2, 49).view(1, 1, -1, 1, 1) - 0.9, truth[2][:48])
    assert fading.drift < -5 and fading.adherence[1] < steady.adherence[1]
    with pytest.raises(ConfigError, match="33 frames"):
        scorer.drift(video[:, :, :32], truth[2][:48])


def test_two_shapes_are_told_apart_in_any_order():
    world = ToyWorld(ToyWorldConfig(num_shapes=2, height=32, width=32, radius=3.0, colours=tuple(COLOURS), start_grid=0))
    scorer = ToyScorer(world, num_reference=128)
    told = world.scenes(64, seed=7)
    gap = (told.start[:, 0] - told.start[:, 1]).abs()
    apart = torch.minimum(gap, 32 - gap).amin(dim=1) > 8  # never hide each other at the start
    scenes = told[apart]
    prompts = world.captions(scenes)
    swapped = [" and ".join(reversed(prompt.split(" and "))) for prompt in prompts]
    video = world.render(scenes)[:, :, :4]
    first, second = scorer.score(video, prompts), scorer.score(video, swapped)
    assert first.joint == second.joint > 0.95
    assert abs(first.score - second.score) < 1e-9


def test_frechet_distance_is_that_of_gaussians() -> None:
    """Against the eigenvalues of A B, whose square roots are those of A^1/2 B A^1/2."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(50, 4, generator=generator), 2 * torch.randn(60, 4, generator=generator) + 1
    means = [x.double().mean(0) for x in (a, b)]
    covariances = [torch.cov(x.double().T) for x in (a, b)]
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert 0 <= frechet_distance(a, a) < 1e-6
    by_hand = (a[:, 0].mean() - b[:, 0].mean()) ** 2 + (a[:, 0].std() - b[:, 0].std()) ** 2
    assert frechet_distance(a[:, :1], b[:, :1]) == pytest.approx(float(by_hand), rel=1e-5)
    with pytest.raises(ConfigError, match="finite samples"):
        frechet_distance(a / 0, b)
    with pytest.raises(ConfigError, match="at least 2 samples"):
        frechet_distance(a[:1], b)


def test_expected_entropy_of_small_cases():
    assert expected_entropy(1, cells=16) == pytest.approx(0)
    assert expected_entropy(2, cells=4) == pytest.approx(0.75 * math.log(2))
    draws = torch.randint(0, 16, (4000, 50), generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(draws, 16).sum(dim=1).double() / 50
    assert expected_entropy(50, cells=16) == pytest.approx(float(-(counts * counts.clamp(min=1e-300).log()).sum(1).mean()), abs=0.01)


def test_bad_requests_are_refused(scorer, truth):
    with pytest.raises(ConfigError, match="prompt each"):
        scorer.score(truth[1], truth[2][:-1])
    with pytest.raises(ConfigError, match="at least 8"):
        scorer.score(truth[1][:4], truth[2][:4])
    for videos, told in (
        (truth[1] * float("nan"), "NaN or infinite pixels"),
        (truth[1].to(torch.uint8), r"got torch.uint8 \["),
        (truth[1][..., :4], "are floats"),
        (truth[1][:, :, :2], "at least 3 frames"),
    ):
        with pytest.raises(ConfigError, match=told):
            scorer.score(videos, truth[2])
    with pytest.raises(ConfigError, match="not of this world"):
        scorer.score(truth[1], ["a dog on a beach"] * len(truth[2]))
