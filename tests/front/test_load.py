"""`rcm.load`: light until it is used, a prompt or several, the same pixels as the checkpoint's own
loop.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import rcm
from rcm.core.errors import CheckpointError, ConfigError
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.video_io import probe
from rcm.storage.shipped import asset, toy_checkpoint

PROMPT = "a red square moving left"


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, rcm; rcm.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        rcm.lod  # noqa: B018


def test_a_prompt_streams_as_the_checkpoint_does() -> None:
    model = rcm.load(device="cpu")
    video, report = model.generate(PROMPT, seed=3)
    expected, _ = open_checkpoint(toy_checkpoint()).generate([PROMPT], seed=3)
    assert torch.equal(video, expected)
    chunks = list(model.stream([PROMPT, "a blue cross moving up"], seed=3))
    assert len(chunks) == len(report.chunk_seconds) and chunks[0].frames.shape[:2] == (2, 3)
    assert torch.cat([chunk.frames for chunk in chunks], dim=2).shape[2:] == video.shape[2:]


@pytest.mark.parametrize(("told", "left"), [("", 1), ("2", 2)])
def test_a_toy_takes_one_thread_unless_told_otherwise(told: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rcm.load(device="cpu")
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)


def test_save_enlarges_small_videos(tmp_path) -> None:
    model = rcm.load(device="cpu")
    big, raw = (model.save(tmp_path / f"{n}.mp4", PROMPT, upscale=n) for n in (None, 1))
    side = model.loaded.pixel_size[0]
    assert (probe(big).height, probe(raw).height, probe(big).num_frames) == (256, side, 17)


def test_wrong_calls_are_told(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        rcm.load(tmp_path / "gone")
    with pytest.raises(ConfigError, match="a prompt is a text or a list of texts"):
        rcm.load(device="cpu").stream([1])
    with pytest.raises(ConfigError, match="the shipped file toy/gone is neither at"):
        asset("toy/gone")
