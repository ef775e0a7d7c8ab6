"""Files that a run reads: those that it lacks are named by key, and those that it is given for
nothing.
"""

from __future__ import annotations

import pytest

from rcm.configs.inputs import unread_files
from rcm.core.errors import ConfigError

SMALL = "experiment=causal_wan2pt1_1pt3B_res480p_t2v_"
M = "model.config."


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("tf_c3-3", {M + "student_ckpt", "dataloader_train.tar_path_pattern"}),
        ("tf_dcm_c3-3", {M + "student_ckpt", M + "causal_teacher_ckpt", "dataloader_train.tar_path_pattern"}),
        ("sf_dmd_c1-1", {M + "student_ckpt", M + "bidirectional_teacher_ckpt", "dataloader_train.tar_path_pattern"}),
        (
            "tf_scm_sf_dmd_c1-1",
            {M + "student_ckpt", M + "causal_teacher_ckpt", M + "bidirectional_teacher_ckpt", "dataloader_train.tar_path_pattern"},
        ),
        ("sf_dmd_c1-1_debug", {"dataloader_train.tar_path_pattern"}),
    ],
)
def test_missing_inputs_are_listed_by_key(composed, name: str, keys: set[str]) -> None:
    assert {sentence.split()[0] for sentence in composed(SMALL + name).missing} == keys
    with pytest.raises(ConfigError, match="cannot start") as caught:
        composed(SMALL + name, require_inputs=True)
    assert all(key in str(caught.value) for key in keys)


def test_bidirectional_rcm_asks_for_its_teacher_and_the_negative_prompt(composed, tmp_path) -> None:
    row, data = "experiment=wan2pt1_1pt3B_res480p_t2v_rCM", "dataloader_train.tar_path_pattern=shards"
    assert [s.split()[0] for s in composed(row, data).missing] == [M + "teacher_ckpt", M + "neg_embed_path"]
    assert [s.split()[0] for s in composed(row, data, M + "teacher_guidance=1").missing] == [M + "teacher_ckpt"]


def test_paths_that_do_not_exist_are_named(composed, tmp_path) -> None:
    there = tmp_path / "weights.pt"
    there.touch()
    inputs = [f"{M}student_ckpt={there}", "dataloader_train.tar_path_pattern=shards", f"{M}fake_score_ckpt={tmp_path / 'nowhere'}"]
    run = composed(SMALL + "tf_c3-3", *inputs)
    assert [s.split("=")[0] for s in run.missing] == [M + "fake_score_ckpt"]
    assert "does not exist" in run.missing[0]


def test_guidance_asks_for_the_negative_prompt(composed, tmp_path) -> None:
    there = tmp_path / "weights.pt"
    there.touch()
    inputs = [f"{M}student_ckpt={there}", f"{M}causal_teacher_ckpt={there}", "dataloader_train.tar_path_pattern=shards"]
    assert "neg_embed_path is empty" in composed(SMALL + "tf_dcm_c3-3", *inputs).missing[0]
    assert not composed(SMALL + "tf_dcm_c3-3", *inputs, M + "causal_guidance=1").missing
    assert not composed(SMALL + "tf_dcm_c3-3", *inputs, f"{M}neg_embed_path={there}").missing


def test_files_that_a_run_reads_nowhere_are_named(composed, tmp_path) -> None:
    there = tmp_path / "weights.pt"
    there.touch()
    keys = ("causal_teacher_ckpt", "bidirectional_teacher_ckpt", "fake_score_ckpt", "neg_embed_path")
    given = [f"{M}{key}={there}" for key in keys]
    assert unread_files(composed("experiment=toy_tf_c3-3", *given).config) == [M + key for key in keys]
    assert unread_files(composed("experiment=toy_sf_dmd_c3-3", *given, M + "bidirectional_guidance=3").config) == [M + keys[0]]
    assert not unread_files(composed("experiment=toy_tf_c3-3").config)
