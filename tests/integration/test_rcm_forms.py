"""Bidirectional rCM: without its consistency term, and with either warm-up of the tangent."""

from __future__ import annotations

from pathlib import Path

from tests.integration.entry import launch, lines, small, write_network

M = "model.config."
ROLES = ("net", "net_teacher", "net_fake_score")


def rcm(job: Path, *words: str, iterations: int = 2) -> list[dict[str, float]]:
    """What a small run logs."""
    start = job.parent / "start.safetensors"
    if not start.exists():
        write_network(start, seed=3)
    fixed = [f"{M}teacher_ckpt={start}", M + "teacher_guidance=1", M + "student_update_freq=2", "precision=fp64"]
    assert launch("experiment=toy_rCM", *small(job, roles=ROLES, iterations=iterations), *fixed, *words) == 0
    return lines(job)


def test_distribution_matching_alone_has_no_warm_up(tmp_path: Path) -> None:
    """`loss_scale=0` with a row's `tangent_warmup`: DMD from the first iteration, the fake score's
    turn in the second.
    """
    first, second = rcm(tmp_path / "job", M + "loss_scale=0", M + "tangent_warmup=1000")
    assert "loss/dmd" in first and "loss/scm" not in first and "grad_norm/fake_score" in second
    again = rcm(tmp_path / "plain", M + "loss_scale=0", M + "tangent_warmup=0")
    assert again == [first, second]


def test_forms_of_the_tangent_differ_during_the_warm_up_alone(tmp_path: Path) -> None:
    found = {
        (form, warmup): rcm(tmp_path / f"{form}{warmup}", f"{M}tangent_form={form}", f"{M}tangent_warmup={warmup}", iterations=1)[0]
        for form in ("paper", "release")
        for warmup in (0, 10)
    }
    assert found["paper", 0] == found["release", 0]
    assert found["paper", 10]["grad_norm/student"] != found["release", 10]["grad_norm/student"]
    assert found["paper", 10] != found["paper", 0]
