"""Every method trains through the training command: finite losses, gradients in every tensor of
every trained role, a checkpoint that describes itself.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from loguru import logger

from tests.integration.entry import FRAMES, launch, lines, small, stored, weights, write_network

M = "model.config."
STUDENT, CAUSAL, BIDIRECTIONAL, FAKE = "student", "causal", "bidirectional", "fake"
DISTILLED = ("net", "net_causal_teacher")
SELF_FORCED = ("net", "net_bidirectional_teacher", "net_fake_score")
RCM = ("net", "net_teacher", "net_fake_score")
CRITIC = {"fake_score"}


@dataclass(frozen=True)
class Stage:
    """One row: the experiment, its networks, where they start, more words, and the terms of each
    role's turns.
    """

    experiment: str
    networks: tuple[str, ...] = ("net",)
    feeds: dict[str, str] = field(default_factory=lambda: {"student_ckpt": STUDENT})
    words: tuple[str, ...] = ()
    student: frozenset[str] = frozenset()
    critic: bool = False

    @property
    def pattern(self) -> str | None:
        """Block pattern in the experiment's name."""
        return next((p for p in FRAMES if p in self.experiment), None)


def plain(experiment: str, *words: str, term: str) -> Stage:
    """A stage that trains the student alone, from its own checkpoint."""
    return Stage(experiment, words=words, student=frozenset({term}))


def distilled(experiment: str, *words: str, terms: tuple[str, ...]) -> Stage:
    """A stage with a causal teacher."""
    feeds = {"student_ckpt": STUDENT, "causal_teacher_ckpt": CAUSAL}
    return Stage(experiment, DISTILLED, feeds, (M + "causal_guidance=2", *words), frozenset(terms))


def self_forced(experiment: str, *words: str) -> Stage:
    """A stage with a rollout, a bidirectional teacher and a critic."""
    feeds = {"student_ckpt": STUDENT, "bidirectional_teacher_ckpt": BIDIRECTIONAL, "fake_score_ckpt": FAKE}
    words = (M + "bidirectional_guidance=2", *words)
    return Stage(experiment, SELF_FORCED, feeds, words, frozenset({"sf_dmd"}), critic=True)


def rcm(*words: str, terms: tuple[str, ...], critic: bool = True) -> Stage:
    """Bidirectional rCM; its student starts from the teacher."""
    networks, words = RCM if critic else RCM[:2], (M + "teacher_guidance=2", *words)
    return Stage("toy_rCM", networks, {"teacher_ckpt": BIDIRECTIONAL}, words, frozenset(terms), critic=critic)


JOINT = {"student_ckpt": STUDENT, "causal_teacher_ckpt": CAUSAL, "bidirectional_teacher_ckpt": BIDIRECTIONAL}
NOISY = M + "context_from_last_step=True"
STAGES = {
    "bidirectional": plain("toy_bidirectional", term="diffusion"),
    "tf c1-4": plain("toy_tf_c1-4", term="tf"),
    "tf c3-3": plain("toy_tf_c3-3", term="tf"),
    "tf noisy": plain("toy_tf_c1-1", NOISY, term="tf"),
    "df random": plain("toy_df_c3-3", term="df"),
    "df same": plain("toy_df_c1-1", M + "df_timestep_strategy=same", term="df"),
    "df fopp": plain("toy_df_c1-4", M + "df_timestep_strategy=fopp", term="df"),
    "tf_kd": plain("toy_tf_kd_c3-3", term="tf_kd"),
    "df_kd": plain("toy_df_kd_c1-1", term="df_kd"),
    "tf_dcm": distilled("toy_tf_dcm_c3-3", terms=("tf_dcm",)),
    "tf_dcm noisy": distilled("toy_tf_dcm_c1-1", NOISY, M + "context_from_last_step_start_chunk=1", terms=("tf_dcm",)),
    "tf_scm": distilled("toy_tf_scm_c1-4", terms=("tf_scm",)),
    "tf_scm noisy": distilled("toy_tf_scm_c3-3", NOISY, terms=("tf_scm",)),
    "tf_dscm": distilled("toy_tf_dscm_c1-1", terms=("tf_dcm", "tf_scm")),
    "sf_dmd": self_forced("toy_sf_dmd_c3-3"),
    "sf_dmd 1 step": self_forced("toy_sf_dmd_1step_c1-1"),
    "sf_dmd replayed": self_forced("toy_sf_dmd_2step_c1-4_replayed"),
    "sf_dmd noisy": self_forced("toy_sf_dmd_2step_noisy_ctx_c1-4"),
    "sf_dmd long": self_forced("toy_sf_dmd_long_c3-3"),
    "sf_dmd long replayed": self_forced("toy_sf_dmd_long_c1-4_replayed"),
    "joint": Stage(
        "toy_tf_scm_sf_dmd_c3-3", (*SELF_FORCED, "net_causal_teacher"), JOINT, student=frozenset({"tf_scm", "sf_dmd"}), critic=True
    ),
    "rCM": rcm(terms=("scm", "dmd")),
    "rCM dcm": rcm(M + "cm_type=dcm", terms=("dcm", "dmd")),
    "rCM rf": rcm(M + "use_rf_scm=True", terms=("scm", "dmd")),
    "rCM semi-continuous": rcm(M + "fd_type=1", terms=("scm", "dmd")),
    "rCM discrete difference": rcm(M + "fd_type=2", terms=("scm", "dmd")),
    "rCM fixed times": rcm(M + "dmd_fix_timesteps=True", terms=("scm", "dmd")),
    "rCM without consistency": rcm(M + "loss_scale=0", terms=("dmd",)),
    "rCM without critic": rcm("net_fake_score=null", terms=("scm",), critic=False),
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights for student and teachers, none of them zero."""
    folder = tmp_path_factory.mktemp("starts")
    return {
        name: write_network(folder / f"{name}.safetensors", seed=seed) for seed, name in enumerate((STUDENT, CAUSAL, BIDIRECTIONAL, FAKE))
    }


def words(stage: Stage, job: Path, starts: dict[str, Path], *more: str, iterations: int = 4) -> list[str]:
    """The command line of a stage."""
    critic = ["student_update_freq=2", "scheduler_fake_score.warm_up_steps=1", "optimizer_fake_score.weight_decay=0"]
    tangent = [M + "tangent_warmup=0"] if any("scm" in term or term == "dmd" for term in stage.student) else []
    return [
        f"experiment={stage.experiment}",
        *small(job, frames=FRAMES.get(stage.pattern, 3), iterations=iterations, roles=stage.networks),
        *(f"{M}{key}={starts[name]}" for key, name in stage.feeds.items()),
        *(M + word for word in critic if stage.critic),
        *tangent,
        *stage.words,
        *more,
    ]


def unmoved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """Tensors that four iterations left as they were (without weight decay: no gradient reached
    them).
    """
    assert before.keys() == after.keys()
    return [name for name in before if torch.equal(before[name], after[name].to(before[name].dtype))]


@pytest.mark.parametrize("name", STAGES)
def test_every_method_trains(tmp_path: Path, starts: dict[str, Path], name: str) -> None:
    stage, job = STAGES[name], tmp_path / "job"
    assert launch(*words(stage, job, starts)) == 0
    records = lines(job)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for record in records for value in record.values())
    turns = [("student", stage.student), ("fake_score", CRITIC)] if stage.critic else [("student", stage.student)]
    for record, (role, terms) in zip(records, (turns * 4)[:4], strict=True):
        assert {key for key in record if key.startswith("loss/")} == {f"loss/{term}" for term in terms}
        assert record[f"grad_norm/{role}"] > 0
    first = stored(starts[stage.feeds.get("student_ckpt", BIDIRECTIONAL)])
    assert not unmoved(first, weights(job))
    assert not unmoved(first, weights(job, "ema"))
    if stage.critic:
        assert not unmoved(stored(starts[stage.feeds.get("fake_score_ckpt", BIDIRECTIONAL)]), weights(job, "fake_score"))
    described = json.loads((job / "checkpoints/iter_000000004/rcm.json").read_text())
    assert (described["pattern"], described["iteration"], described["experiment"]) == (stage.pattern, 4, stage.experiment)
    recipe = described["extra"]["recipe"] or {}
    assert (recipe.get("window"), recipe.get("sinks")) == ((2, 1) if "_long_" in stage.experiment else (None, None))


NOISY_PAIRS = {
    "tf": ("tf c3-3", "tf c3-3", (NOISY,)),
    "tf_dcm": ("tf_dcm", "tf_dcm", (NOISY,)),
    "tf_scm": ("tf_scm noisy", "tf_scm noisy", (M + "context_from_last_step=False",)),
    "sf_dmd": ("sf_dmd noisy", "sf_dmd noisy", (M + "context_from_last_step=False",)),
}
"""Stage with one setting of the context, and the words that turn it over."""


def first_numbers(stage: Stage, job: Path, starts: dict[str, Path], *more: str) -> dict[str, float]:
    """What the first iteration of a stage logged."""
    assert launch(*words(stage, job, starts, *more, iterations=1)) == 0
    return lines(job)[0]


@pytest.mark.parametrize("name", NOISY_PAIRS)
def test_noisy_context_reaches_the_objective(tmp_path: Path, starts: dict[str, Path], name: str) -> None:
    one, other, turned = NOISY_PAIRS[name]
    a = first_numbers(STAGES[one], tmp_path / "a", starts)
    b = first_numbers(STAGES[other], tmp_path / "b", starts, *turned)
    assert a.keys() == b.keys()
    assert a[f"loss/{name}"] != b[f"loss/{name}"]


@pytest.mark.slow
def test_strategies_of_diffusion_forcing_differ(tmp_path: Path, starts: dict[str, Path]) -> None:
    losses = {}
    for strategy in ("random", "same", "fopp"):
        stage = plain("toy_df_c1-1", M + f"df_timestep_strategy={strategy}", term="df")
        losses[strategy] = first_numbers(stage, tmp_path / strategy, starts)["loss/df"]
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("form", [pytest.param("False", marks=pytest.mark.slow), "True"])
def test_difference_schemes_approach_the_exact_tangent(tmp_path: Path, starts: dict[str, Path], form: str) -> None:
    """First order: a step ten times smaller brings the gradient norm several times nearer."""

    def norm(fd_type: int, fd_size: float) -> float:
        scheme = (M + f"use_rf_scm={form}", M + f"fd_type={fd_type}", M + f"fd_size={fd_size}", "precision=fp64")
        stage = rcm("net_fake_score=null", *scheme, terms=("scm",), critic=False)
        return first_numbers(stage, tmp_path / f"scheme_{fd_type}_{fd_size}", starts)["grad_norm/student"]

    exact = norm(0, 1e-4)
    for fd_type in (1, 2):
        coarse, fine = (abs(norm(fd_type, size) / exact - 1) for size in (1e-4, 1e-5))
        assert 0 < 4 * fine < coarse < 0.1


def test_replayed_training_gives_the_same_weights(tmp_path: Path, starts: dict[str, Path]) -> None:
    """Three iterations of student and critic: the gradient is the same sum in another order."""
    plain_job, replayed_job = tmp_path / "plain", tmp_path / "replayed"
    words_of = [(plain_job, "toy_sf_dmd_2step_c3-3"), (replayed_job, "toy_sf_dmd_2step_c3-3_replayed")]
    for job, experiment in words_of:
        assert launch(*words(self_forced(experiment), job, starts, "precision=fp64", iterations=3)) == 0
    for a, b in zip(lines(plain_job), lines(replayed_job), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    start = stored(starts[STUDENT])
    for role in ("reg", "ema", "fake_score"):
        a, b = weights(plain_job, role), weights(replayed_job, role)
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-9
    assert max((weights(plain_job)[k] - start[k]).abs().max().item() for k in start) > 1e-5


@pytest.mark.slow
def test_weights_of_other_blocks_are_told_of(tmp_path: Path, starts: dict[str, Path]) -> None:
    """A checkpoint trained in chunks of 3 may start a frame-wise student, but not without a
    word.
    """
    first, second = STAGES["tf c3-3"], tmp_path / "second"
    assert launch(*words(first, tmp_path / "first", starts, iterations=1)) == 0
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    try:
        again = [f"{M}student_ckpt={tmp_path / 'first'}", "checkpoint.save_iter=9"]
        assert launch("experiment=toy_tf_c1-1", *small(second, frames=3, iterations=1, roles=("net",)), *again) == 0
        assert any("was trained in blocks c3-3, this run has c1-1" in line for line in said)
        said.clear()
        assert launch(*words(first, tmp_path / "third", {STUDENT: tmp_path / "first"}, iterations=1)) == 0
        assert not any("trained in blocks" in line for line in said)
    finally:
        logger.remove(sink)
