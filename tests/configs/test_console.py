"""Training speaks shortly on its console and in full in its folder, and says how to go on; it cries
RANDOM only where that stays so.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from loguru import logger

from rcm.configs import cli
from rcm.configs.console import LOG_FILE, told
from rcm.train.observers import LogLines

VALUES = {"loss/tf": 3.14159, "lr/student": 0.001, "time/seconds_per_iteration": 0.25, "tf/nonfinite_samples": 0.0}


def test_console_is_short_and_the_file_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with told(tmp_path):
        LogLines().write(10, VALUES)
        logger.warning("look out")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in lines] == ["iteration 10  tf 3.142  0.25 s/it", "warning: look out"]
    whole = (tmp_path / LOG_FILE).read_text()
    assert "iteration 10  loss/tf 3.142  lr/student 0.001  time/seconds_per_iteration 0.25  tf/nonfinite_samples 0" in whole
    assert "rcm.train.observers:write:" in whole
    logger.info("after the run nobody listens")
    assert capsys.readouterr().err == ""


def test_other_ranks_speak_of_trouble_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with told(tmp_path, rank=3, world_size=4):
        logger.info("all is well")
        logger.warning("look out")
    assert capsys.readouterr().err[10:] == "rank 3: warning: look out\n"
    assert not (tmp_path / LOG_FILE).exists()


def test_a_finished_run_tells_the_line_that_streams_it_and_a_resumed_one_is_not_called_random(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["experiment=toy_tf_c3-3", f"job.output_root={tmp_path}", "trainer.progress_bar=False", "dataloader_train.batch_size=2"]
    words += ["dataloader_train.num_videos=8", "model.config.net.num_layers=1"]
    said = []
    for iterations in (1, 2):
        assert cli.main([*words, f"trainer.max_iter={iterations}"]) == 0
        said.append(capsys.readouterr().err)
    job = tmp_path / "rcm" / "toy" / "toy_tf_c3-3"
    assert all(f"stream it: rcm stream --ckpt {shlex.quote(str(job))} --prompt 'a red square moving left'\n" in text for text in said)
    assert "net: RANDOM weights" in said[0] and "RANDOM" not in said[1]
    assert "resumed at iteration 1" in said[1]
    assert all(len(line) < 200 for text in said for line in text.splitlines())
