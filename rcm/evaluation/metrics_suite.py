"""The offline suite: numbers of a clip, their sense, what they see, and a verdict on two clips.

It downloads nothing and is not VBench: nothing compares with published numbers. Networks of
packages (extra `metrics`) are used where installed, and named as absent where not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.evaluation import metrics_pixels as pixels
from rcm.evaluation.metrics_brisque import MIN_SIDE, Brisque
from rcm.evaluation.metrics_features import (
    CutDetector,
    FrameFeatures,
    consistency,
    embedding_drift,
    steps,
)


@dataclass(frozen=True)
class Metric:
    """A number of a clip. `worse` "higher" or "lower"; `step` a change that matters, the unit of
    the verdict; `sees`, `blind` in words; `judges` whether the verdict asks it.
    """

    name: str
    worse: Literal["higher", "lower"]
    step: float
    sees: str
    blind: str
    judges: bool = True

    def harm(self, before: float, after: float) -> float:
        """How much worse `after` is than `before`, in steps; negative where it is better."""
        change = (after - before) / self.step
        return change if self.worse == "higher" else -change


_TABLE = """
flicker higher 0.001  brightness that goes up and down
    local flicker; a steady fade
stutter higher 0.1  frames that are not between their neighbours
    evenly wrong motion
frozen higher 0.03  frames held while the clip moves
    a clip that never moves
jump higher 0.25  a change that stands out: cut, lost chunk, bad join
    jumps in clips that move much everywhere
repeats higher 0.06  a part shown again
    motion that is periodic by itself counts as repeated
detail lower 0.02  finest detail lost: blur, compression
    noise passes for detail; content that is soft by nature
noise higher 0.0008  grain that changes from frame to frame
    grain that stands still; fast texture counts a little
blocks higher 0.1  steps at borders of 8 x 8 blocks
    other block sizes; scaled video
tint_drift higher 0.01  colours other at the end
    drift that comes back; a scene whose colours change
light_drift* higher 0.02  light or contrast other at the end
    cannot tell a moving light from drift
cut higher 0.3  a change of scene
    jumps inside a scene; clips under about 20 frames
brisque* higher 4  unnatural frames: blur, noise, blocks
    time; drawn pictures, which noise makes natural to it
consistency* lower 0.01  content that changes
    cannot tell motion from change
embedding_drift* higher 0.02  content other at the end
    cannot tell a story from drift
embedding_jump* higher 0.5  content that changes at once
    small jumps
motion* higher 0.01  how much changes from frame to frame
    says nothing of quality
"""
"""Name (* is told but does not judge), sense, step, what it sees; below, what it is blind to."""


def _metrics() -> Iterator[Metric]:
    rows = re.findall(r"^(\w+)(\*?) (\w+) (\S+)  (.+)\n +(.+)$", _TABLE, re.M)
    for name, told, worse, step, sees, blind in rows:
        sense: Literal["higher", "lower"] = "lower" if worse == "lower" else "higher"
        yield Metric(name, sense, float(step), sees, blind, judges=not told)


METRICS = tuple(_metrics())
"""motion is one minus VBench's temporal_flickering; less motion is no merit."""

BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Models:
    """Networks that are there; `absent` says why others are not."""

    features: FrameFeatures | None = None
    cuts: CutDetector | None = None
    brisque: Brisque | None = None
    absent: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def installed(cls, *, device: str = "cpu") -> Models:
        """All whose packages are installed."""
        found: dict[str, Any] = {}
        absent: dict[str, str] = {}
        for name, make in (
            ("features", lambda: FrameFeatures(device=device)),
            ("cuts", lambda: CutDetector(device=device)),
            ("brisque", Brisque),
        ):
            try:
                found[name] = make()
            except ConfigError as error:
                absent[name] = str(error)
        return cls(**found, absent=absent)


@dataclass(frozen=True)
class ClipScores:
    """Numbers of a clip by metric, those that could be measured, and series: name -> values."""

    values: Mapping[str, float]
    curves: Mapping[str, Sequence[float]]


def measure_clip(
    clip: Tensor, *, models: Models = Models(), feature_stride: int = 1, brisque_stride: int = 8
) -> ClipScores:
    """All that can be measured of a clip [F, 3, H, W] in [0, 1], F >= 2; networks see each n-th
    frame, features at least two.
    """
    if clip.ndim != 4 or clip.shape[0] < 2 or clip.dtype != torch.float32:
        raise ConfigError(
            "a clip is float32 [F, 3, H, W] of at least 2 frames, got"
            f" {clip.dtype} {list(clip.shape)}; metrics_pixels.clip_of makes one of a video"
        )
    curves = {
        "motion": pixels.differences(clip),
        "flicker": pixels.flicker(clip),
        "stutter": pixels.unevenness(clip),
        "frozen": pixels.frozen(clip),
        "jump": pixels.jumps(clip),
        "repeats": pixels.repeats(clip),
        "detail": pixels.detail(clip),
        "noise": pixels.noise(clip),
        "blocks": pixels.blockiness(clip),
    }
    values = {
        name: float(series.mean()) if series.numel() else 0.0 for name, series in curves.items()
    }
    values["jump"] = float(curves["jump"].max())
    colours = pixels.colour(clip)
    values["light_drift"] = float(pixels.drift(colours[:, :2]))
    values["tint_drift"] = float(pixels.drift(colours[:, 2:]))
    names = ("brightness", "contrast", "red over green", "blue over green")
    curves |= dict(zip(names, colours.T, strict=True))
    if models.cuts is not None:
        curves["cut"] = models.cuts(clip)
        values["cut"] = float(curves["cut"].max())
    if models.brisque is not None and min(clip.shape[2:]) >= MIN_SIDE:
        curves["brisque"] = models.brisque(clip, every=brisque_stride)
        values["brisque"] = float(curves["brisque"].mean())
    if models.features is not None:
        features = models.features(clip[:: min(feature_stride, clip.shape[0] - 1)])
        curves["consistency"], moved = consistency(features), steps(features)
        values["consistency"] = float(curves["consistency"].mean())
        values["embedding_drift"] = embedding_drift(features)
        moved = moved.clamp_min(1e-4)  # below, a still clip's rounding decides
        values["embedding_jump"] = float((moved.max() / moved.median()).log())
    return ClipScores(values, {name: [float(v) for v in series] for name, series in curves.items()})


@dataclass(frozen=True)
class Verdict:
    """Of two clips of one content: `worse` "first", "second" or None for no difference; `harm` of
    the second in steps by metric; `reason` the metric that decided.
    """

    worse: Literal["first", "second"] | None
    harm: Mapping[str, float]
    reason: str | None


def judge(first: Mapping[str, float], second: Mapping[str, float]) -> Verdict:
    """Which of two clips of the same content is worse.

    The strongest worsening decides: harm of one kind often improves another number (blur removes
    noise, a freeze removes stutter), so gains are not set against it. Less than half a step on both
    sides is no difference. `ConfigError` for numbers that are not finite, and for none in common.
    """
    shared = [m for m in METRICS if m.judges and m.name in first and m.name in second]
    odd = [m.name for m in shared if not math.isfinite(first[m.name] - second[m.name])]
    if odd:
        raise ConfigError(f"{', '.join(odd)} of the two clips is no finite number: no verdict")
    harm = {m.name: max(-100.0, min(100.0, m.harm(first[m.name], second[m.name]))) for m in shared}
    if not harm:
        raise ConfigError("the two clips have no metric in common")
    most, least = max(harm, key=lambda name: harm[name]), min(harm, key=lambda name: harm[name])
    if max(harm[most], -harm[least]) < 0.5 or harm[most] == -harm[least]:
        return Verdict(None, harm, None)
    if harm[most] > -harm[least]:
        return Verdict("second", harm, most)
    return Verdict("first", harm, least)


def mean_scores(scores: Sequence[ClipScores]) -> dict[str, float]:
    """Mean over clips of every metric that all clips have."""
    if not scores:
        return {}
    names = [m.name for m in METRICS if all(m.name in s.values for s in scores)]
    return {name: sum(s.values[name] for s in scores) / len(scores) for name in names}


def worst(scores: Mapping[str, ClipScores], metric: str, *, count: int = 3) -> list[str]:
    """The names of the clips that `metric` finds worst, the worst first."""
    sense = -1 if BY_NAME[metric].worse == "higher" else 1
    there = [name for name, s in scores.items() if metric in s.values]
    return sorted(there, key=lambda name: sense * scores[name].values[metric])[:count]
