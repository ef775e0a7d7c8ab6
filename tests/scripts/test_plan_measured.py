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
from scripts.bench_scale_rows import LEAN, ROWS, composed

ANEW = "trainer.keep_gathered_gib=0"
SMALL = "sf_dmd_replayed-1.3B-one"
SCALE = [
    # row of scripts.bench_scale, cards, {role: seconds}, {role: GiB}, more words
    ("tf_diffusion-1.3B-one", 1, {"student": 3.26}, {"student": 33.8}),
    ("tf_scm-1.3B-one", 1, {"student": 12.46}, {"student": 60.7}),
    ("tf_diffusion-1.3B-fsdp", 4, {"student": 3.352}, {"student": 18.08}),
    ("tf_diffusion-1.3B-hsdp", 4, {"student": 3.365}, {"student": 23.31}),
    ("tf_diffusion-1.3B-fsdp-bf16_reduce", 4, {"student": 3.359}, {"student": 18.04}),
    ("tf_diffusion-1.3B-fsdp-accumulate2_each", 4, {"student": 6.692}, {"student": 19.37}),
    ("tf_diffusion-1.3B-ulysses4", 4, {"student": 1.037}, {"student": 9.29}),
    ("tf_diffusion-14B-ulysses4-keep_attention_mlp", 4, {"student": 4.976}, {"student": 80.99}),
    ("tf_scm-14B-ulysses4-keep_attention_mlp", 4, {"student": 9.580}, {"student": 87.81}),
    ("rcm-14B-ulysses4-block_wise", 4, {"student": 14.46, "fake_score": 5.918}, {"student": 111.05, "fake_score": 107.29}, *LEAN),
    ("tf_diffusion-14B-ulysses4", 4, {"student": 5.76}, {"student": 75.5}),
    ("tf_diffusion-14B-ulysses4-keep_attention", 4, {"student": 5.27}, {"student": 75.6}),
    ("tf_scm-14B-ulysses4", 4, {"student": 10.13}, {"student": 82.4}),
    ("tf_dcm-14B-ulysses4", 4, {"student": 9.48}, {"student": 82.3}),
    # on a slower host: passes over single chunks wait for it
    ("sf_dmd_replayed-14B-ulysses4-each", 4, {}, {"student": 126.8, "fake_score": 120.8}),
    ("tf_diffusion-1.3B-fsdp", 2, {"student": 3.40}, {"student": 23.30}),
    ("tf_diffusion-1.3B-ulysses2", 2, {"student": 1.91}, {"student": 17.64}),
    ("tf_diffusion-14B-ulysses2-keep_attention_lean", 2, {"student": 10.09}, {"student": 92.18}),
    ("tf_diffusion-14B-ulysses2-keep_attention_mlp_lean", 2, {"student": 9.71}, {"student": 103.14}),
    ("tf_scm-14B-ulysses2-keep_attention_lean", 2, {"student": 18.87}, {"student": 105.97}),
    ("tf_dcm-14B-ulysses2-keep_attention_lean", 2, {"student": 17.45}, {"student": 105.92}),
    ("sf_dmd_replayed-14B-ulysses2-states_lean", 2, {"student": 20.15, "fake_score": 15.60}, {"student": 112.43, "fake_score": 100.91}),
    (f"{SMALL}-small_roles", 1, {"student": 6.34, "fake_score": 4.25}, {"student": 54.90, "fake_score": 48.77}),
    # on a machine busy with tests: their times are none
    (f"{SMALL}-small_roles", 1, {}, {"student": 52.37, "fake_score": 48.76}, ANEW),
    (f"{SMALL}-lever_states", 1, {}, {"student": 25.89, "fake_score": 22.28}, ANEW),
    (f"{SMALL}-lever_idle_roles", 1, {}, {"student": 44.45, "fake_score": 43.36}, ANEW),
    (f"{SMALL}-lever_bfloat16_states", 1, {}, {"student": 41.78, "fake_score": 38.17}, ANEW),
    (f"{SMALL}-lever_int8_states", 1, {}, {"student": 39.11, "fake_score": 32.98}),
    (f"{SMALL}-lever_float8_states", 1, {}, {"student": 39.11, "fake_score": 32.98}),
    (f"{SMALL}-lever_fp8_storage", 1, {}, {"student": 53.66, "fake_score": 47.52}),
    (f"{SMALL}-lever_parameters", 1, {}, {"student": 15.03, "fake_score": 8.87}),
    (f"{SMALL}-lever_parameters", 1, {"student": 30.91}, {"student": 12.63, "fake_score": 8.87}, "trainer.gradient_sync=each"),
    ("tf_scm-1.3B-one-lever_fp8_storage", 1, {"student": 13.12}, {"student": 47.91}),
    ("rcm-14B-ulysses2-states_lean", 2, {"student": 28.59, "fake_score": 12.23}, {"student": 108.43, "fake_score": 100.90}),
    ("rcm-14B-one-lora", 1, {"student": 45.93}, {"student": 57.67, "fake_score": 56.50}),
    ("sf_dmd_replayed-14B-one-lora", 1, {"student": 26.75, "fake_score": 20.11}, {"student": 65.82, "fake_score": 62.03}),
    ("sf_dmd_replayed-1.3B-one-lora_published_roles", 1, {"fake_score": 13.62}, {"student": 46.65, "fake_score": 56.00}),
    ("sf_dmd_replayed-1.3B-one-published_waiting", 1, {"fake_score": 18.66}, {"student": 70.81, "fake_score": 116.09}),
    ("tf_scm-14B-one-lora", 1, {"student": 32.02}, {"student": 73.51}),
    ("tf_diffusion-14B-one-lora", 1, {"student": 16.40}, {"student": 73.46}),
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
    """Time within 10 percent, peak memory within 1 (2.5 below for rows under Ulysses; 2 above for
    networks on the host and adapters).
    """
    times = {phase.role: phase.seconds / seconds[phase.role] for phase in found.phases if phase.role in seconds}
    peaks = {phase.role: phase.peak / GIB / gib[phase.role] for phase in found.phases}
    assert times == {role: pytest.approx(1, abs=0.1) for role in seconds}
    below = 0.025 if found.job.context > 1 else 0.01
    above = 0.02 if found.job.host_parameters or found.job.net("student").rank else 0.01
    assert all(1 - below <= ratio <= 1 + above for ratio in peaks.values()), peaks


@pytest.mark.parametrize("measured", SCALE, ids=lambda row: "-".join(map(str, (row[0], row[1], *row[4:]))))
def test_rows_of_the_scaling_benchmark(measured) -> None:
    name, cards, seconds, gib, *more = measured
    row = next(row for row in ROWS if row.name == name)
    hold(predict(plan_job(composed(row, ranks=cards, tiny=False, more=more), ranks=cards), H200), seconds, gib)


@pytest.mark.parametrize(("case", "seconds", "gib"), MEMORY, ids=lambda value: value if isinstance(value, str) else "")
def test_cases_of_the_memory_benchmark(case, seconds, gib) -> None:
    words = [*bench_memory.CASES[case], *bench_memory.ONE_CARD, *bench_memory.NO_FILES]
    words.append(ANEW)  # as it was then
    run = compose_run(words, world_size=None, require_inputs=False)
    hold(bench_memory.expect(run, ranks=1, device=torch.device("cuda")), seconds, gib)
