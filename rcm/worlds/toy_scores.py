"""Exact scores of generated videos against the captions they were asked for and the world they
should come from.

Every number comes from `toy_factors`, by arithmetic on pixels. The one-number `score` in [0, 100]
is 100 * (0.2 * mean(colour, shape, direction) + 0.3 * joint + 0.15 * motion + 0.1 * fit + 0.15 *
realism + 0.1 * diversity), every part in [0, 1]. Real videos score above 98; a still video of the
right shape about 50, noise or an empty frame below 5. Shape legend: N videos, S shapes per video, F
frames, D known factors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.worlds.toy_factors import FactorReader, Factors
from rcm.worlds.toy_world import ToyWorld

PRESENT_FIT = 0.5  # a shape counts as there when its template explains half of its mask
PURITY = 0.6  # the shapes' colours must hold this share of all coloured mass
DIRECTION_ERROR = 0.5  # mean velocity within half a speed of the caption's, in every segment
GRID = 4  # start positions are binned GRID x GRID for their entropy
SCALE_FLOOR = 0.1  # factors that hardly vary in real videos (size, jitter) are measured in tenths
FRECHET_SCALE = 20.0  # excess Frechet distance that halves realism


@dataclass(frozen=True)
class ToyScores:
    """Scores of a set of videos; all but `frechet`, `jitter` and `score` in [0, 1], higher is
    better.

    `colour`, `shape`, `direction`, `joint`: share of shapes (joint: of videos) that match the
    caption; `motion` = mean exp(-jitter - speed error), 0 for an absent shape, where `jitter` is
    the root mean square deviation of frame-to-frame motion from constant velocity and the speed
    error is that of the mean velocity's length, both in units of the speed; `fit`: share of the
    mask that a perfect shape explains; `frechet`: Frechet distance on known factors (lower is
    better), `frechet_floor` its value for real videos of the same number; `realism` = 1 / (1 +
    max(0, frechet - floor) / 20); `diversity`: spread of start positions, times the share of videos
    that show a shape; `score` in [0, 100]. Shapes that cross hide each other: with `num_shapes` > 1
    real videos score less than 100, so compare with the score of real ones.
    """

    colour: float
    shape: float
    direction: float
    joint: float
    motion: float
    jitter: float
    fit: float
    frechet: float
    frechet_floor: float
    realism: float
    diversity: float
    score: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class DriftReport:
    """`adherence` [0, 100] of successive windows; `drift`: the worst later one less the first."""

    adherence: tuple[float, ...]
    drift: float


@dataclass(frozen=True)
class _Verdict:
    """Per shape [N, S]: is it there, does each attribute match, how does its motion differ."""

    present: Tensor
    colour: Tensor
    shape: Tensor
    direction: Tensor
    jitter: Tensor
    speed_error: Tensor
    fit: Tensor

    @property
    def joint(self) -> Tensor:
        return (self.colour & self.shape & self.direction).all(dim=1)

    @property
    def caption(self) -> float:
        """0.4 * mean of the attributes + 0.6 * joint."""
        parts = [part.float().mean() for part in (self.colour, self.shape, self.direction)]
        return float(0.4 * sum(parts) / 3 + 0.6 * self.joint.float().mean())

    @property
    def motion(self) -> float:
        return float((torch.exp(-self.jitter - self.speed_error) * self.present).mean())

    @property
    def adherence(self) -> float:
        """What can be said of one window: captions, motion and fit, in [0, 100]."""
        return 100 * (0.6 * self.caption + 0.25 * self.motion + 0.15 * _mean(self.fit))


class ToyScorer:
    """Scores videos of a world against real ones, scenes of `seed`, which no data set uses."""

    def __init__(
        self, world: ToyWorld, *, num_reference: int = 1024, seed: int = 987_654_321
    ) -> None:
        self.world, self.reader = world, FactorReader(world)
        scenes = world.scenes(num_reference, seed=seed)
        factors = self.reader.read(world.render(scenes))
        self._scale = torch.ones(1, dtype=torch.float64)
        vectors = self._vectors(factors)
        self._scale = vectors.std(dim=0).clamp(min=SCALE_FLOOR)
        self._vectors_real = vectors / self._scale
        starts = factors.centre[:, 0, 0]
        self._spread = _mean(self._distance(starts[:-1], starts[1:]))

    def score(self, videos: Tensor, prompts: Sequence[str]) -> ToyScores:
        """`ToyScores` of `videos` [N, 3, F, H, W] in [-1, 1], one caption of this world each.

        Ask for every caption equally often, and for some twice: realism compares with the world's
        even mix, diversity looks inside a caption. `ConfigError` for fewer than 8 videos.
        """
        if len(prompts) != len(videos) or len(videos) < 8:
            raise ConfigError(
                f"scoring needs at least 8 videos with a prompt each, got {len(videos)} videos and"
                f" {len(prompts)} prompts"
            )
        if videos.ndim == 5 and videos.shape[2] < 3:
            raise ConfigError(
                f"scoring needs at least 3 frames, of two a motion has no spread; got"
                f" {videos.shape[2]}"
            )
        factors = self.reader.read(videos)
        told = self.world.parse(list(prompts))
        verdict = self._judge(
            factors, told.colour, told.shape, self.world.actions(told, num_frames=videos.shape[2])
        )
        frechet, floor = self.frechet(factors), self._floor(len(videos))
        caption, motion, fit = verdict.caption, verdict.motion, _mean(verdict.fit)
        realism = 1 / (1 + max(0.0, frechet - floor) / FRECHET_SCALE)
        diversity = self._diversity(factors.centre[:, 0, 0], prompts) * _mean(verdict.present)
        total = 0.5 * caption + 0.15 * motion + 0.1 * fit + 0.15 * realism + 0.1 * diversity
        return ToyScores(
            colour=_mean(verdict.colour),
            shape=_mean(verdict.shape),
            direction=_mean(verdict.direction),
            joint=_mean(verdict.joint),
            motion=motion,
            jitter=_mean(verdict.jitter),
            fit=fit,
            frechet=frechet,
            frechet_floor=floor,
            realism=realism,
            diversity=diversity,
            score=100 * total,
        )

    def drift(self, videos: Tensor, prompts: Sequence[str]) -> DriftReport:
        """Adherence over windows of the world's length; F covers at least two of them."""
        hop = self.world.config.num_frames - 1
        if videos.shape[2] < 1 + 2 * hop:
            raise ConfigError(
                f"drift needs at least {1 + 2 * hop} frames (two windows of {hop + 1}), got"
                f" {videos.shape[2]}"
            )
        told = self.world.parse(list(prompts))
        actions = self.world.actions(told, num_frames=videos.shape[2])
        adherence = []
        for start in range(0, videos.shape[2] - hop, hop):
            factors = self.reader.read(videos[:, :, start : start + hop + 1])
            verdict = self._judge(
                factors, told.colour, told.shape, actions[..., start : start + hop]
            )
            adherence.append(verdict.adherence)
        return DriftReport(tuple(adherence), min(adherence[1:]) - adherence[0])

    def frechet(self, factors: Factors) -> float:
        """Frechet distance to the reference videos, in standard deviations of their factors."""
        return frechet_distance(self._vectors(factors) / self._scale, self._vectors_real)

    def _floor(self, num: int) -> float:
        """The distance of real videos: what `num` samples cost by being few."""
        others = self._vectors_real
        parts = [others[i : i + num] for i in range(0, len(others) - num + 1, num)][:4]
        return sum(frechet_distance(part, others) for part in parts) / len(parts) if parts else 0.0

    def _judge(self, factors: Factors, colour: Tensor, shape: Tensor, actions: Tensor) -> _Verdict:
        """Compare shapes as seen and told, in the assignment that agrees most, colour first."""
        present = (factors.fit.mean(dim=2) > PRESENT_FIT) & (
            factors.purity.sum(dim=1, keepdim=True) > PURITY
        )
        best: _Verdict | None = None
        best_rank = torch.empty(0)
        for order in itertools.permutations(range(colour.shape[1])):
            told = list(order)
            off, jitter, speed_error = self._motion_error(factors, actions[:, told])
            verdict = _Verdict(
                present,
                (factors.colour == colour[:, told]) & present,
                (factors.shape == shape[:, told]) & present,
                (off < DIRECTION_ERROR) & present,
                jitter,
                speed_error,
                factors.fit.mean(dim=2),
            )
            rank = (10 * verdict.colour + verdict.shape.int() + verdict.direction.int()).sum(dim=1)
            if best is None:
                best, best_rank = verdict, rank
                continue
            better = (rank > best_rank)[:, None]
            pairs = zip(vars(verdict).values(), vars(best).values(), strict=True)
            best = _Verdict(*(torch.where(better, new, old) for new, old in pairs))
            best_rank = torch.maximum(rank, best_rank)
        assert best is not None
        return best

    def _motion_error(self, factors: Factors, actions: Tensor) -> tuple[Tensor, ...]:
        """Worst mean velocity error over runs of one action, rms deviation from their means, worst
        error of speed; [N, S], in units of the speed.
        """
        world = self.world
        path = world.unfolded(factors.centre[:, :, 0], actions)
        path = path if world.config.boundary == "wrap" else world.fold(path)
        seen, told = (step / world.config.speed for step in (factors.step, path.diff(dim=2)))
        run = torch.cat(
            [torch.zeros_like(actions[..., :1]), (actions.diff(dim=-1) != 0).cumsum(-1)], dim=-1
        )
        member = torch.nn.functional.one_hot(run, int(run.max()) + 1).to(seen)
        share = member / member.sum(dim=2, keepdim=True).clamp(min=1)
        seen_mean, told_mean = (torch.einsum("nsfg,nsfd->nsgd", share, x) for x in (seen, told))
        error = seen_mean - told_mean
        rest = seen - told - torch.einsum("nsfg,nsgd->nsfd", member, error)
        speed_error = (seen_mean.norm(dim=-1) - told_mean.norm(dim=-1)).abs().amax(dim=-1)
        return error.norm(dim=-1).amax(dim=-1), rest.square().sum(-1).mean(-1).sqrt(), speed_error

    def _vectors(self, factors: Factors) -> Tensor:
        """Factors float64 [N, D]: colour, size, fits, start on the circle, mean and spread of
        velocity.
        """
        size = torch.tensor([self.world.config.width, self.world.config.height])
        phase = 2 * math.pi * factors.centre[:, :, 0] / size
        speed = self.world.config.speed
        parts = [
            factors.rgb,
            factors.area.mean(dim=2, keepdim=True) / (math.pi * self.world.config.radius**2),
            factors.fits,
            phase.sin(),
            phase.cos(),
            factors.step.mean(dim=2) / speed,
            factors.step.std(dim=2) / speed,
        ]
        return torch.cat(parts, dim=2).flatten(1).double()

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        config, gap = self.world.config, (a - b).abs()
        if config.boundary == "wrap":
            size = torch.tensor([config.width, config.height], dtype=a.dtype)
            gap = torch.minimum(gap, size - gap)
        return gap.norm(dim=-1)

    def _diversity(self, starts: Tensor, prompts: Sequence[str]) -> float:
        """The smaller of: entropy of start cells over that of even starts; mean distance of starts
        inside a caption over that of real videos.
        """
        low, span = (part.to(starts) for part in self.world.start_range())
        place = (starts - low) / span * GRID
        # then cells are centred on a start grid of as many positions
        wraps = self.world.config.boundary == "wrap"
        cell = (place + 0.5).long() % GRID if wraps else place.long().clamp(0, GRID - 1)
        counts = torch.bincount(cell[:, 0] * GRID + cell[:, 1], minlength=GRID * GRID).double()
        share = counts[counts > 0] / counts.sum()
        entropy = abs(float((share * share.log()).sum()))
        spread = min(1.0, entropy / expected_entropy(len(starts), cells=GRID * GRID))
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        pairs = [pair for rows in groups.values() for pair in itertools.combinations(rows, 2)]
        if not pairs:
            return spread
        first, second = torch.tensor(pairs).unbind(1)
        return min(spread, _mean(self._distance(starts[first], starts[second])) / self._spread)


def _mean(values: Tensor) -> float:
    return float(values.float().mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of samples [N, D] as Gaussians; float64.

    Few samples bias it upward: compare sets of equal size. `ConfigError` for fewer than two, and
    for values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ConfigError(
            f"a Frechet distance needs two sets [N, D] of at least 2 samples, got {list(a.shape)}"
            f" and {list(b.shape)}"
        )
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ConfigError("a Frechet distance needs finite samples, got NaN or infinity")
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    away = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(away + cov_a.trace() + cov_b.trace() - 2 * cross))


def expected_entropy(num: int, *, cells: int) -> float:
    """Mean entropy (nats) of `num` even draws over `cells` cells: -cells * sum_k Binomial(k; num, 1
    / cells) (k / num) ln(k / num).
    """
    k = torch.arange(1, num + 1, dtype=torch.float64)
    log_choose = math.lgamma(num + 1) - torch.lgamma(k + 1) - torch.lgamma(num - k + 1)
    log_p = torch.where(k == num, 0.0, -math.inf)
    if cells > 1:
        log_p = log_choose + k * math.log(1 / cells) + (num - k) * math.log1p(-1 / cells)
    return float(-cells * (log_p.exp() * (k / num) * (k / num).log()).sum())
