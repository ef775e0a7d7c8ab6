"""The world of the demo and its stages: which experiments, what feeds what, how long each takes
beside the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rcm.worlds.toy_world import ToyWorldConfig
from scripts.demo_gates import SELF_FORCED_START

WORLD = ToyWorldConfig()
"""17 frames of 8x8 pixels: one of three shapes in one of four colours, moving in one of four
directions on a torus.
"""
DATA = ["--source=toy", "--size=8x8", "--frames=17", "--num=2048", "--shard-size=512", "--seed=0"]
"""Arguments of scripts.build_dataset."""

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
    def train_share(self) -> float:
        """Share of the work that is training."""
        return self.cost[0] / sum(self.cost)

    @property
    def kind(self) -> str:
        """The stage without its block pattern."""
        return self.name.rsplit("_", 1)[0] if "_c" in self.name else self.name

    @property
    def pattern(self) -> str | None:
        """Its block pattern, None for the whole-video teacher."""
        return self.name.rsplit("_", 1)[1] if "_c" in self.name else None


def _annealed(iterations: int, *, tail: int) -> tuple[str, ...]:
    """Overrides: that many iterations, of which the last `tail` keep the final rate."""
    return f"trainer.max_iter={iterations}", f"scheduler.cycle_length={iterations - tail}"


def _few_steps(
    pattern: str, kind: str, length: tuple[str, ...], cost: tuple[float, float]
) -> Stage:
    tf = f"tf_{pattern}"
    feeds = {"student_ckpt": tf, "causal_teacher_ckpt": tf}
    return Stage(f"{kind}_{pattern}", f"toy_{kind}_{pattern}", feeds, length, cost)


def _self_forced(pattern: str, iterations: int, cost: tuple[float, float]) -> Stage:
    start = f"{SELF_FORCED_START[pattern]}_{pattern}"
    feeds = {"student_ckpt": start, "bidirectional_teacher_ckpt": "bidirectional"}
    length = (f"trainer.max_iter={iterations}",)
    return Stage(f"sf_dmd_{pattern}", f"toy_sf_dmd_2step_{pattern}", feeds, length, cost)


def _forced(pattern: str, start: str, length: tuple[str, ...], cost: tuple[float, float]) -> Stage:
    return Stage(f"tf_{pattern}", f"toy_tf_{pattern}", {"student_ckpt": start}, length, cost)


# Few-step students of single frames are good sooner, so these stages are shorter. Chunks of 3 start
# from single frames: what takes longest to find among frames of equal noise is which way a caption
# moves them, and a frame that has the clean past before it finds that soon.
STAGES = (
    Stage("bidirectional", "toy_bidirectional", cost=(290, 12)),
    _forced("c1-1", "bidirectional", _annealed(600, tail=30), (113, 15)),
    _few_steps("c1-1", "tf_dcm", _annealed(120, tail=10), (38, 4)),
    _few_steps("c1-1", "tf_scm", _annealed(200, tail=10), (77, 4)),
    _self_forced("c1-1", 150, (50, 6)),
    _forced("c3-3", "tf_c1-1", _annealed(400, tail=20), (76, 12)),
    _few_steps("c3-3", "tf_dcm", _annealed(250, tail=20), (78, 4)),
    _few_steps("c3-3", "tf_scm", _annealed(220, tail=15), (85, 4)),
    _self_forced("c3-3", 400, (88, 6)),
)
"""All stages, in the order of the page."""

BRANCHES = (
    ("bidirectional", "tf_c1-1"),
    ("tf_c3-3", "tf_scm_c3-3", "sf_dmd_c3-3"),
    ("tf_dcm_c1-1", "sf_dmd_c1-1", "tf_scm_c1-1", "tf_dcm_c3-3"),
)
"""What runs first, then what runs side by side after it, about as long as each other. A stage of
one branch may be fed by another.
"""

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
    """What runs first, then what runs side by side after it: (first, ...), (branch, ...), ..."""
    known = {stage.name: stage for stage in STAGES}
    return (
        (QUICK,) if quick else tuple(tuple(known[name] for name in branch) for branch in BRANCHES)
    )


def flat(chosen: Sequence[Sequence[Stage]]) -> tuple[Stage, ...]:
    """All stages, in the order of the page."""
    order = [stage.name for stage in STAGES]
    return tuple(sorted((s for one in chosen for s in one), key=lambda s: order.index(s.name)))
