"""The stages of the demo: which experiments, what feeds what, how long each takes beside the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.demo_gates import SELF_FORCED_START

PATTERNS = ("c3-3", "c1-1")

ABOUT = {
    "bidirectional": "The teacher: sees the whole video at once, many steps.",
    "tf": "Stage 1, teacher forcing: the causal teacher, which sees the past alone. Many steps.",
    "tf_dcm": (
        "Stage 2a, discrete consistency: few steps, learned from neighbouring times of the causal"
        " teacher."
    ),
    "tf_scm": (
        "Stage 2b, continuous consistency: few steps, learned from the derivative along the"
        " teacher's path."
    ),
    "sf_dmd": (
        "Stage 3, self-forced distribution matching: learns on its own rollouts, as it will be"
        " streamed."
    ),
}


@dataclass(frozen=True)
class Stage:
    """One training run: `name`, its `experiment`, which earlier stages feed which config keys,
    further `overrides`, and the `cost` of training and scoring it, relative to the other stages
    (seconds on one core of the machine in the README).
    """

    name: str
    experiment: str
    feeds: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    cost: tuple[float, float] = (100.0, 20.0)

    @property
    def kind(self) -> str:
        """The stage without its block pattern."""
        return self.name.rsplit("_", 1)[0] if "_c" in self.name else self.name

    @property
    def pattern(self) -> str | None:
        """Its block pattern, None for the whole-video teacher."""
        return self.name.rsplit("_", 1)[1] if "_c" in self.name else None


FIRST = Stage("bidirectional", "toy_bidirectional", cost=(290, 12))


def branch(pattern: str) -> tuple[Stage, ...]:
    """The causal stages of one block pattern, in order."""
    tf, dcm, scm = f"tf_{pattern}", f"tf_dcm_{pattern}", f"tf_scm_{pattern}"
    causal = {"student_ckpt": tf, "causal_teacher_ckpt": tf}
    start = {
        "student_ckpt": f"{SELF_FORCED_START[pattern]}_{pattern}",
        "bidirectional_teacher_ckpt": "bidirectional",
    }
    framewise = pattern == "c1-1"
    # its samples are further from the teacher's, and its branch has time left
    longer = () if framewise else ("trainer.max_iter=500",)
    return (
        Stage(
            tf,
            f"toy_tf_{pattern}",
            {"student_ckpt": "bidirectional"},
            cost=(200, 40 if framewise else 25),
        ),
        Stage(dcm, f"toy_tf_dcm_{pattern}", causal, cost=(100, 12)),
        Stage(scm, f"toy_tf_scm_{pattern}", causal, cost=(140, 12)),
        Stage(
            f"sf_dmd_{pattern}",
            f"toy_sf_dmd_2step_{pattern}",
            start,
            longer,
            cost=(160 if framewise else 150, 20),
        ),
    )


SHORT = (
    "trainer.max_iter=1000",
    "scheduler.cycle_length=970",
    "optimizer.lr=3.0e-3",
    "dataloader_train.batch_size=8",
)
QUICK = (Stage("tf_c1-1", "toy_tf_c1-1", overrides=SHORT, cost=(120, 14)),)
"""One method from random weights: the causal teacher alone, frame by frame. Too short for gates;
shapes, colours and motion are there.
"""


def branches(quick: bool) -> tuple[tuple[Stage, ...], ...]:
    """What runs first, then what runs side by side after it: (first,), (branch, ...)."""
    return (QUICK,) if quick else ((FIRST,), *(branch(pattern) for pattern in PATTERNS))


def flat(chosen: Sequence[Sequence[Stage]]) -> tuple[Stage, ...]:
    """All stages, in the order of the page."""
    return tuple(stage for one in chosen for stage in one)
