"""Does the offline suite see known harm? Clips harmed in every way against themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from rcm.evaluation.metrics_degrade import DEGRADATIONS, STRENGTHS, untouched
from rcm.evaluation.metrics_suite import METRICS, judge

Values = Mapping[str, float]
SEEN = 1.0
"""Steps of a metric from which on it counts as having seen a harm."""


@dataclass(frozen=True)
class Case:
    """One harmed clip, the kind and strength of the harm, its numbers before and after."""

    clip: str
    kind: str
    strength: int
    before: Values
    after: Values

    @property
    def right(self) -> bool:
        """Whether the suite finds the harmed clip worse."""
        return judge(self.before, self.after).worse == "second"


def harmed_versions(source: Tensor) -> Iterable[tuple[str, int, Tensor]]:
    """(kind, strength, clip) of every harm; ("untouched", 0, clip) first."""
    yield "untouched", 0, untouched(source)
    for kind, harm in DEGRADATIONS.items():
        for strength in STRENGTHS:
            yield kind, strength, harm(source, strength)


def cases_of(clip: str, source: Tensor, measure: Callable[[Tensor], Values]) -> list[Case]:
    """All cases of one clip."""
    versions = iter(harmed_versions(source))
    _, _, clean = next(versions)
    before = measure(clean)
    return [
        Case(clip, kind, strength, before, measure(harmed)) for kind, strength, harmed in versions
    ]


def share_right(cases: Iterable[Case]) -> tuple[int, int]:
    """(cases ranked right, all cases)."""
    judged = [case.right for case in cases]
    return sum(judged), len(judged)


def who_sees_what(cases: list[Case]) -> dict[str, dict[str, str]]:
    """Kind -> metric -> the weakest strength (1 to 3) at which half of the clips are a step worse,
    or "-".
    """
    found: dict[str, dict[str, str]] = {}
    for kind in dict.fromkeys(case.kind for case in cases):
        row = {}
        for metric in METRICS:
            harms: dict[int, list[float]] = {strength: [] for strength in STRENGTHS}
            for c in cases:
                if c.kind == kind and metric.name in c.before and metric.name in c.after:
                    harm = metric.harm(c.before[metric.name], c.after[metric.name])
                    harms[c.strength].append(harm)
            seen = (str(s + 1) for s, found in harms.items() if found and median(found) >= SEEN)
            row[metric.name] = next(seen, "-")
        found[kind] = row
    return found


def tables(cases: list[Case]) -> str:
    """Two Markdown tables: right rankings by kind and strength, and who sees what."""
    kinds = list(dict.fromkeys(case.kind for case in cases))
    lines = ["| harm | weak | middle | strong |", "|---|---|---|---|"]
    for kind in kinds:
        cells = []
        for strength in STRENGTHS:
            right, total = share_right(
                c for c in cases if c.kind == kind and c.strength == strength
            )
            cells.append(f"{right} of {total}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    seen = who_sees_what(cases)
    names = [m.name for m in METRICS if any(m.name in c.before for c in cases)]
    lines += ["", f"| harm | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {kind} | {' | '.join(seen[kind][name] for name in names)} |" for kind in kinds]
    return "\n".join(lines)
