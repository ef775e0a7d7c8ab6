"""Comparing checkpoints on the same prompts and noise, by means and by paired differences."""

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
    """The mean of `values`, between quantiles (1 - level) / 2 of the means of resamples.

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
    """Scores of checkpoints over the same `videos`: checkpoint -> metric -> interval, of the mean,
    and of the difference to `reference`, video by video.
    """

    reference: str
    videos: tuple[str, ...]
    means: Mapping[str, Mapping[str, Interval]]
    differences: Mapping[str, Mapping[str, Interval]]


def compare(scores: Mapping[str, Mapping[str, ClipScores]]) -> Comparison:
    """Compare checkpoint -> video -> scores, over the same videos, with the first."""
    reference, *others = scores
    videos = tuple(sorted(scores[reference]))
    metrics = [
        m.name
        for m in METRICS
        if all(m.name in s.values for by_video in scores.values() for s in by_video.values())
    ]

    def intervals(name: str, *, less: str | None = None) -> dict[str, Interval]:
        found = {}
        for m in metrics:
            values = [scores[name][v].values[m] for v in videos]
            base = [scores[less][v].values[m] for v in videos] if less else [0.0] * len(videos)
            found[m] = bootstrap([a - b for a, b in zip(values, base, strict=True)])
        return found

    means = {name: intervals(name) for name in scores}
    paired = {name: intervals(name, less=reference) for name in others}
    return Comparison(reference, videos, means, paired)


def require_same_conditions(folders: Sequence[Path]) -> None:
    """`ConfigError` unless all runs gave the videos they share the same text and seed."""
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
