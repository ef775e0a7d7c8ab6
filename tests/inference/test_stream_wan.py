"""Streaming from a checkpoint that was trained on the latents of Wan's VAE and umT5's
embeddings.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.inference.stream import main
from rcm.nets.condition import Condition
from rcm.pipelines.described import PieceFiles
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.streaming import stream_latents
from rcm.pipelines.video_io import probe
from tests.support.tiny_checkpoint import STUDENT, write_checkpoint
from tests.support.tiny_wan_files import PROMPT, WanFiles, dit, tiny_codec, write_wan_files

SHAPE = (1, 16, 6, 4, 6)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> WanFiles:
    return write_wan_files(tmp_path_factory.mktemp("checkpoints"))


def job(folder: Path, *, vae: str, text: str) -> Path:
    pieces = {"codec": {"name": "wan_vae", "path": vae}, "text": {"name": "umt5", "path": text}, "latent_shape": list(SHAPE[1:])}
    write_checkpoint(folder, STUDENT, net=dit(), fps=16, **pieces)
    return folder


def test_the_described_files_decode_and_encode(files, tmp_path):
    model = open_checkpoint(job(tmp_path / "job", vae=str(files.vae), text=str(files.text)), weights="reg")
    assert model.pixel_size == (32, 48)
    video, report = model.generate([PROMPT], seed=2)
    cond = model.denoiser.prepare(Condition(UMT5TextEncoder.from_files(files.text).encode([PROMPT])))
    generator = torch.Generator().manual_seed(2)
    latents = torch.cat([x for _, x in stream_latents(model.denoiser, cond, STUDENT, shape=SHAPE, generator=generator)], dim=2)
    torch.testing.assert_close(video, tiny_codec().decode(latents), atol=1e-4, rtol=1e-4)
    assert len(report.chunk_seconds) == 2 and video.shape[2] == 21


def test_flags_say_where_the_files_are_here(files, tmp_path, capsys):
    elsewhere = job(tmp_path / "job", vae="far/away.pth", text="far/away.pth")
    given = ["--ckpt", str(elsewhere), "--prompt", PROMPT, "--device", "cpu", "--save_path", str(tmp_path / "a.mp4")]
    assert main(given) == 2
    assert "far/away.pth" in capsys.readouterr().err
    assert main([*given, "--text_encoder_path", str(files.text)]) == 2
    assert "there is no far/away.pth; say where Wan2.1_VAE.pth is with --vae_path" in capsys.readouterr().err
    cache = ["--text_cache", str(tmp_path / "cache")]
    assert main([*given, "--text_encoder_path", str(files.text), "--vae_path", str(files.vae), *cache]) == 0
    assert probe(tmp_path / "a.mp4").num_frames == 21
    assert any((tmp_path / "cache").rglob("*"))


def test_a_toy_checkpoint_reads_no_files(files, tmp_path, capsys):
    write_checkpoint(tmp_path / "toy", STUDENT)
    given = ["--ckpt", str(tmp_path / "toy"), "--prompt", "a red circle moving left", "--device", "cpu"]
    assert main([*given, "--vae_path", str(files.vae), "--save_path", str(tmp_path / "a.mp4")]) == 2
    assert f"which reads no file; leave out vae={files.vae} (--vae_path)" in capsys.readouterr().err
    assert PieceFiles().vae is None
