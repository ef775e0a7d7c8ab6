"""The release's names of the VBench commands: each file is there and runs, or says what took its
place.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from rcm.front import old_names
from tests.hygiene.source import ROOT

FOLDER = ROOT / "evaluation"


def call(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [name, *words])
    return old_names.main(str(FOLDER / name))


def test_every_name_has_its_file_and_no_other_file_is_there() -> None:
    assert {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")} == set(old_names.OLD)


@pytest.mark.parametrize("name", old_names.OLD)
def test_help_names_the_command_that_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert call(name, "--help", monkeypatch=monkeypatch) == 0
    now = old_names.OLD[name]
    told = capsys.readouterr().out
    means = f"is now {now}\n" if isinstance(now, str) else f"runs: rcm {' '.join(now)} ...\n"
    assert told.startswith(f"evaluation/{name} {means}")
    assert isinstance(now, str) or f"\nusage: rcm {now[0]} {now[1]} [-h]" in told


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("vbench_text2video/sample_videos.py", ["--dit_path", "x", "--no_augmented_prompt"], "--dit_path x does not exist"),
        ("vbench_text2video/cal_scores.py", ["--result_dir", "x"], "no *_eval_results.json in x"),
        ("vbench_text2video/eval_vision_reward.py", ["--eval_info", "x"], "is now rcm vbench score --videos_path DIR --vision_reward"),
        ("vbench_i2v/sample_videos_i2v.py", ["--dit_path", "x", "--prompt_json", "y"], "no prompt list at y"),
        ("vbench_i2v/cal_scores_i2v.py", ["--result_dir", "x"], "no *_eval_results.json in x"),
        ("vbench_i2v/eval_i2v_dims.py", ["--videos_path", "x", "--resolution", "16-9"], "--videos_path x is no folder"),
    ],
)
def test_old_flags_reach_the_command(name: str, words: list[str], sentence: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(name, *words, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_a_file_runs_by_its_path_from_anywhere(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "vbench_i2v" / "cal_scores_i2v.py", "--result_dir", "x"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    script = subprocess.run(["sh", FOLDER / "vbench_i2v" / "download_images.sh"], capture_output=True, text=True)
    assert script.returncode == 2 and "--vbench_repo CLONE" in script.stderr
