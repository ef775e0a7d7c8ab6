"""Comparing checkpoints on the same prompts and noise: means with bootstrap intervals, and paired
differences, which noise does not blur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.evaluation.metrics_suite import METRICS, ClipScores
from rcm.evaluation.vbench_manifest import read_manifest


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean of `values` with the interval between the (1 - level) / 2 quantiles of means of
    resamples with replacement.

    `ConfigError` for no values, or ones that are not finite.
    """
    data = torch.tensor(list(values), dtype=torch.float64)
    if not data.numel() or not bool(torch.isfinite(data).all()):
        raise ConfigError(f"a bootstrap needs finite values, got {list(values)[:5]}")
    picks = torch.randint(
        len(data), (draws, len(data)), generator=torch.Generator().manual_seed(seed)
    )
    means = data[picks].mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(data.mean()), low, high)


@dataclass(frozen=True)
class Comparison:
    """Scores of several checkpoints over the same videos. `means` checkpoint -> metric -> interval;
    `differences` checkpoint -> metric -> interval of its value less that of `reference`, video by
    video. `videos` the names that all have.
    """

    reference: str
    videos: tuple[str, ...]
    means: Mapping[str, Mapping[str, Interval]]
    differences: Mapping[str, Mapping[str, Interval]]


def compare(
    scores: Mapping[str, Mapping[str, ClipScores]],
    *,
    reference: str | None = None,
    level: float = 0.95,
) -> Comparison:
    """Compare checkpoint -> video name -> scores. `reference` None: the first. `ConfigError` unless
    every checkpoint has the same videos.
    """
    names = list(scores)
    reference = names[0] if reference is None else reference
    if len(names) < 2 or reference not in scores:
        raise ConfigError(
            f"a comparison needs at least two checkpoints and a reference among them, got {names}"
            f" and {reference!r}"
        )
    videos = tuple(sorted(scores[reference]))
    for name in names:
        if different := set(scores[name]) ^ set(videos):
            raise ConfigError(
                f"{name} and {reference} are not over the same videos: {sorted(different)[0]!r} is"
                " in one of them only"
            )
    if not videos:
        raise ConfigError("no video to compare")
    metrics = [
        m.name
        for m in METRICS
        if all(m.name in s.values for by_video in scores.values() for s in by_video.values())
    ]
    column = {
        name: {m: [scores[name][v].values[m] for v in videos] for m in metrics} for name in names
    }
    means = {name: {m: bootstrap(column[name][m], level=level) for m in metrics} for name in names}
    differences = {
        name: {
            m: bootstrap(
                [a - b for a, b in zip(column[name][m], column[reference][m], strict=True)],
                level=level,
            )
            for m in metrics
        }
        for name in names
        if name != reference
    }
    return Comparison(reference, videos, means, differences)


def require_same_conditions(folders: Sequence[Path]) -> None:
    """`ConfigError`, naming the first video, unless all runs gave the same text and seed to every
    video they share: prompts and noise equal.
    """
    runs = [(folder, read_manifest(folder)["videos"]) for folder in folders]
    first_folder, first = runs[0]
    for folder, videos in runs[1:]:
        for name in sorted(set(first) & set(videos)):
            for key in ("text", "seed"):
                if first[name][key] != videos[name][key]:
                    raise ConfigError(
                        f"{name} has {key} {first[name][key]!r} in {first_folder} and"
                        f" {videos[name][key]!r} in {folder}; sample both again with the same"
                        " prompts and --seed"
                    )


def side_by_side(videos: Sequence[Tensor]) -> Tensor:
    """Videos [3, F, H, W] next to each other, cut to the shortest, heights padded with white."""
    frames, height = min(v.shape[1] for v in videos), max(v.shape[2] for v in videos)
    padded = [
        torch.nn.functional.pad(v[:, :frames], (0, 2, 0, height - v.shape[2]), value=1.0)
        for v in videos
    ]
    return torch.cat(padded, dim=3)
