"""Group scores and totals of the VBench suites from per-dimension results. Nothing is clamped,
nothing missing is passed over.

Every dimension is mapped to (x - low) / (high - low); a group is the weighted mean of its
dimensions, the total the weighted mean of the groups. Text-to-video: quality counts four times
semantic; image-to-video: both groups count once. Constants as in VBench's own score scripts (arXiv
2311.17982), scores on the 0-1 scale throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_results import finite_number


@dataclass(frozen=True)
class Dimension:
    """A dimension: its group and weight in it, and the raw values mapped to 0 and 1."""

    name: str
    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0

    def normalised(self, raw: float) -> float:
        """`raw` on the scale of the group, not clamped."""
        return (raw - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Suite:
    """A suite: dimensions in the order of its tables, weight of every group in the total."""

    name: str
    dimensions: tuple[Dimension, ...]
    group_weights: Mapping[str, float]

    def __getitem__(self, name: str) -> Dimension:
        return next(d for d in self.dimensions if d.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.dimensions)


_QUALITY = (
    Dimension("subject_consistency", "quality", 0.1462),
    Dimension("background_consistency", "quality", 0.2615),
    Dimension("temporal_flickering", "quality", 0.6293),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975),
    Dimension("dynamic_degree", "quality", weight=0.5),
    Dimension("aesthetic_quality", "quality"),
    Dimension("imaging_quality", "quality"),
)

T2V = Suite(
    "t2v",
    (
        *_QUALITY,
        Dimension("object_class", "semantic"),
        Dimension("multiple_objects", "semantic"),
        Dimension("human_action", "semantic"),
        Dimension("color", "semantic"),
        Dimension("spatial_relationship", "semantic"),
        Dimension("scene", "semantic", 0.0, 0.8222),
        Dimension("appearance_style", "semantic", 0.0009, 0.2855),
        Dimension("temporal_style", "semantic", 0.0, 0.364),
        Dimension("overall_consistency", "semantic", 0.0, 0.364),
    ),
    {"quality": 4.0, "semantic": 1.0},
)

I2V = Suite(
    "i2v",
    (
        Dimension("i2v_subject", "i2v", 0.1462),
        Dimension("i2v_background", "i2v", 0.2615),
        Dimension("camera_motion", "i2v", weight=0.1),
        *(d for d in _QUALITY if d.name != "temporal_flickering"),
    ),
    {"i2v": 1.0, "quality": 1.0},
)

SUITES = {suite.name: suite for suite in (T2V, I2V)}

_SIGNED = ("aesthetic_quality", "appearance_style", "temporal_style", "overall_consistency")
"""Dimensions of cosines, and of a regression, which may be negative; others are shares."""
_ROUNDING = 1e-4
"""By which a mean of cosines in float32 may lie beyond 1."""


@dataclass(frozen=True)
class SuiteScore:
    """Scores of a run on the 0-1 scale. `raw` and `normalised` by dimension, `groups` and `total`
    after normalisation; `missing` names the dimensions that a partial score lacks: its groups and
    total are of the others, and `total` is None where a whole group is missing. `few`: by
    dimension, (videos scored, videos of the suite) where the first are fewer.
    """

    suite: str
    raw: Mapping[str, float]
    normalised: Mapping[str, float]
    groups: Mapping[str, float]
    total: float | None
    missing: tuple[str, ...] = ()
    few: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """Whether dimensions or videos are missing: not comparable with a complete score."""
        return bool(self.missing or self.few)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "missing": list(self.missing), "partial": self.partial}


def aggregate(
    raw: Mapping[str, float],
    suite: Suite = T2V,
    *,
    partial: bool = False,
    few: Mapping[str, tuple[int, int]] = {},
) -> SuiteScore:
    """Groups and total of the raw values (0-1) by dimension; `few` as in `SuiteScore`.

    `ConfigError` for a dimension that is unknown, missing (unless `partial`), no finite number, or
    outside of what it can be: percent and 0-100 results of single videos look like that.
    """
    unknown = sorted(set(raw) - set(suite.names))
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: no dimension of the suite {suite.name}, whose dimensions are"
            f" {', '.join(suite.names)}; take it out of the results, or change --suite"
        )
    missing = tuple(name for name in suite.names if name not in raw)
    if missing and not partial:
        raise ConfigError(
            f"no result for {', '.join(missing)} ({len(raw)} of {len(suite.names)} dimensions are"
            " there); score them, or pass --partial for a score that is marked as partial"
        )
    if not raw:
        raise ConfigError(f"no result for any dimension of the suite {suite.name}")
    for name, value in raw.items():
        if not finite_number(value):
            raise ConfigError(
                f"the result of {name} is {value!r}, no finite number (a dimension without videos"
                " gives NaN); score it again"
            )
        least = -1 if name in _SIGNED else 0
        if not least - _ROUNDING <= value <= 1 + _ROUNDING:
            raise ConfigError(
                f"the result of {name} is {value:g}, expected {least} to 1: raw results are shares"
                " or cosines (divide percent by 100)"
            )
    normalised = {name: suite[name].normalised(raw[name]) for name in suite.names if name in raw}
    means = {group: _mean(suite, group, normalised) for group in suite.group_weights}
    groups = {group: value for group, value in means.items() if value is not None}
    weights, total = suite.group_weights, None
    if len(groups) == len(weights):
        weighted = sum(weights[group] * value for group, value in groups.items())
        total = weighted / sum(weights.values())
    floats = {name: float(raw[name]) for name in normalised}
    return SuiteScore(suite.name, floats, normalised, groups, total, missing, few)


def table(score: SuiteScore) -> str:
    """The score as text: a line per dimension, group and total."""
    suite = SUITES[score.suite]
    lines = [f"{'dimension':<24}{'raw':>9}{'norm':>9}{'weight':>8}  group"]
    for dimension in suite.dimensions:
        name, told = dimension.name, f"{'missing':>9}{'':>9}"
        if name in score.raw:
            told = f"{score.raw[name]:>9.4f}{score.normalised[name]:>9.4f}"
        few = "  {} of {} videos".format(*score.few[name]) if name in score.few else ""
        lines.append(f"{name:<24}{told}{dimension.weight:>8g}  {dimension.group:<8}{few}".rstrip())
    lines += [f"{group:<24}{100 * value:>8.2f}%" for group, value in score.groups.items()]
    undefined = "  not defined: a group is missing"
    total = undefined if score.total is None else f"{100 * score.total:>8.2f}%"
    lines.append(f"{'total':<24}{total}")
    if score.partial:
        lines.append(
            f"PARTIAL: {len(score.missing)} of {len(suite.names)} dimensions are missing,"
            f" {len(score.few)} are of fewer videos than the suite has; not comparable with a"
            " complete score"
        )
    return "\n".join(lines)


def _mean(suite: Suite, group: str, normalised: Mapping[str, float]) -> float | None:
    members = [d for d in suite.dimensions if d.group == group and d.name in normalised]
    if not members:
        return None
    return sum(d.weight * normalised[d.name] for d in members) / sum(d.weight for d in members)
