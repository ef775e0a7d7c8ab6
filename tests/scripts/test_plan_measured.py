"""The planner's word against every iteration that was measured on a card (docs/planner.md and
docs/scale.md name the commands, cards and dates).
"""

from __future__ import annotations

import pytest
import torch

from rcm.configs.cli import DEFAULT_REGISTRY, load_registry
from rcm.configs.compose import compose_run
from rcm.configs.plan_job import plan_job
from rcm.train.planner import Prediction, predict
from rcm.train.planner_card import GIB, H200
from scripts import bench_memory
from scripts.bench_scale_rows import ROWS, composed

SCALE = [
    # row of scripts.bench_scale, cards, {role: seconds}, {role: GiB}
    ("tf_diffusion-1.3B-one", 1, {"student": 3.26}, {"student": 33.8}),
    ("tf_scm-1.3B-one", 1, {"student": 12.46}, {"student": 60.7}),
    ("tf_diffusion-1.3B-fsdp", 4, {"student": 3.59}, {"student": 18.1}),
    ("tf_diffusion-1.3B-ulysses4", 4, {"student": 1.27}, {"student": 9.3}),
    ("tf_diffusion-14B-ulysses4", 4, {"student": 5.76}, {"student": 75.5}),
    ("tf_diffusion-14B-ulysses4-keep_attention", 4, {"student": 5.27}, {"student": 75.6}),
    ("tf_scm-14B-ulysses4", 4, {"student": 10.13}, {"student": 82.4}),
    ("tf_dcm-14B-ulysses4", 4, {"student": 9.48}, {"student": 82.3}),
    ("sf_dmd_replayed-14B-ulysses4-each", 4, {"student": 19.48, "fake_score": 11.32}, {"student": 126.8, "fake_score": 120.8}),
]
MEMORY = [
    # case of scripts.bench_memory, on one card, with the longest rollout
    ("teacher forcing", {"student": 3.23}, {"student": 33.83}),
    ("continuous consistency, 14B teacher", {"student": 12.46}, {"student": 60.68}),
    ("self-forced DMD, 14B teacher", {"student": 9.12, "fake_score": 3.78}, {"student": 76.15, "fake_score": 72.73}),
]


@pytest.fixture(scope="module", autouse=True)
def registry() -> None:
    load_registry(DEFAULT_REGISTRY)


def hold(found: Prediction, seconds: dict[str, float], gib: dict[str, float]) -> None:
    """Time within 8 percent, peak memory within 1 (2.5 below for rows under Ulysses)."""
    times = {phase.role: phase.seconds / seconds[phase.role] for phase in found.phases}
    peaks = {phase.role: phase.peak / GIB / gib[phase.role] for phase in found.phases}
    assert times == {role: pytest.approx(1, abs=0.08) for role in seconds}
    below = 0.025 if found.job.context > 1 else 0.01
    assert all(1 - below <= ratio <= 1.01 for ratio in peaks.values()), peaks


@pytest.mark.parametrize(("name", "cards", "seconds", "gib"), SCALE, ids=lambda value: value if isinstance(value, str) else "")
def test_rows_of_the_scaling_benchmark(name, cards, seconds, gib) -> None:
    row = next(row for row in ROWS if row.name == name)
    hold(predict(plan_job(composed(row, ranks=cards, tiny=False), ranks=cards), H200), seconds, gib)


@pytest.mark.parametrize(("case", "seconds", "gib"), MEMORY, ids=lambda value: value if isinstance(value, str) else "")
def test_cases_of_the_memory_benchmark(case, seconds, gib) -> None:
    words = [*bench_memory.CASES[case], *bench_memory.ONE_CARD, *bench_memory.NO_FILES]
    words.append("trainer.keep_gathered_gib=0")  # as it was then
    run = compose_run(words, world_size=None, require_inputs=False)
    hold(bench_memory.expect(run, ranks=1, device=torch.device("cuda")), seconds, gib)
