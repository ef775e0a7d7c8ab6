"""Suites from Wan's own files and from checkpoints of this package: text to video and image to
video, tiny, on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rcm.evaluation.vbench_manifest import read_manifest
from rcm.pipelines.video_io import probe, read_mp4
from rcm.rollout.recipe import SamplingRecipe
from scripts.vbench_sample import main
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_wan_files import expect_a_tiny_vae, write_wan_files

WAN = ["--device", "cpu", "--model_size", "auto", "--size", "32x48", "--num_frames", "5", "--precision", "fp32", "--vae_precision", "fp32"]


def sample(folder: Path, dit: Path, *more: str) -> int:
    flags = ["--dit_path", str(dit), "--output_dir", str(folder), "--no_augmented_prompt", "--max_prompts", "2", "--num_samples", "2"]
    return main([*flags, *more])


@pytest.mark.parametrize(
    "how",
    [
        ["--arch", "bidirectional", "--distilled", "--num_steps", "1"],
        ["--arch", "bidirectional", "--num_steps", "2", "--guidance_scale", "2"],
        ["--arch", "causal", "--distilled", "--num_steps", "2"],
        ["--arch", "causal", "--num_steps", "2", "--guidance_scale", "2", "--timestep_shift", "3"],
    ],
)
def test_wan_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]) -> None:
    expect_a_tiny_vae(monkeypatch)
    files = write_wan_files(tmp_path)
    where = ["--vae_path", str(files.vae), "--text_encoder_path", str(files.text)]
    assert sample(tmp_path / "o", files.dit, *WAN, *where, *how) == 0
    names = sorted((tmp_path / "o").iterdir())
    assert [probe(path).num_frames for path in names] == [5] * 4 and probe(names[0]).fps == 16
    assert not torch.equal(read_mp4(names[0]), read_mp4(names[1])), "another seed, another video"
    settings = read_manifest(tmp_path / "o")["settings"]
    assert settings["size"] == "32x48" and settings["num_frames"] == 5
    assert len(set(settings["checkpoint"].values())) == 3, "the VAE's and the text encoder's files decide pixels, too"
    assert sample(tmp_path / "o", files.dit, *WAN, *where, *how) == 0, "settings repeat, so a second run goes on"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ([], "say --arch bidirectional or --arch causal"),
        (["--arch", "bidirectional", "--chunk_t", "3"], "--chunk_t belong to --arch causal"),
        (["--arch", "causal", "--distilled", "--guidance_scale", "3"], "--guidance_scale belong to sampling without --distilled"),
        (["--arch", "causal", "--mid_t", "0.5"], "--mid_t belong to few-step sampling"),
        (["--arch", "causal", "--distilled", "--mid_t_schedules", "0.5"], "--mid_t_schedules needs --steps_per_chunk"),
        (["--arch", "causal", "--distilled", "--num_steps", "0"], "--num_steps 0 must be at least 1"),
        (["--arch", "causal", "--distilled", "--num_frames", "6"], "6"),
    ],
)
def test_flags_without_use_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture, how: list[str], told: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"not read before the flags are checked")
    assert sample(tmp_path / "o", path, "--device", "cpu", *how) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_image_to_video_begins_with_the_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(tmp_path / "job", SamplingRecipe("few_step", "c1-1", mids=((5 / 6,),)))
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.full((40, 60, 3), (250, 10, 10), dtype=np.uint8)).save(images / "a red wall.jpg")
    rows = [
        {"prompt_en": f"{what}, zoom in", "dimension": ["i2v_subject"], "image_name": f"{what}.jpg"} for what in ("a red wall", "a hole")
    ]
    listed = tmp_path / "i2v.json"
    listed.write_text(json.dumps(rows))
    flags = ["--suite", "i2v", "--prompt_json", str(listed), "--image_dir", str(images), "--device", "cpu"]
    assert sample(tmp_path / "o", tmp_path / "job", *flags) == 2
    assert "1 of 2 images are not in --image_dir" in capsys.readouterr().err
    assert sample(tmp_path / "o", tmp_path / "job", *flags, "--skip_missing_images") == 0
    first = read_mp4(tmp_path / "o" / "a red wall, zoom in-0.mp4")[:, 0]
    assert float(first[0].mean()) > 0.5 > -0.5 > float(first[2].mean()), "red, as the image"
    info = json.loads((tmp_path / "o_run" / "vbench_eval_info.json").read_text())
    assert [row["image_name"] for row in info] == ["a red wall.jpg"]


def test_image_to_video_runs_from_a_clone_of_vbench(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """List and crops are found where VBench's repository has them; a motion prompt without an image
    takes that of what it begins with.
    """
    write_checkpoint(tmp_path / "job", SamplingRecipe("few_step", "c1-1", mids=((5 / 6,),)))
    base = tmp_path / "VBench" / "vbench2_beta_i2v"
    crops = base / "data" / "crop" / "16-9"
    how = ["--suite", "i2v", "--vbench_repo", str(tmp_path / "VBench"), "--device", "cpu"]
    assert sample(tmp_path / "o", tmp_path / "job", *how) == 2
    assert str(base / "vbench2_i2v_full_info.json") in capsys.readouterr().err
    crops.parent.mkdir(parents=True)
    motion = {"prompt_en": "a red wall, camera pans left", "dimension": ["camera_motion"]}
    rows = [{"prompt_en": "a red wall", "dimension": ["i2v_background"], "image_name": "a red wall.jpg"}, motion]
    (base / "vbench2_i2v_full_info.json").write_text(json.dumps(rows))
    assert sample(tmp_path / "o", tmp_path / "job", *how) == 2
    assert f"no images of the image-to-video suite at {crops}; unpack crop.zip there" in capsys.readouterr().err
    crops.mkdir()
    assert sample(tmp_path / "o", tmp_path / "job", *how, "--skip_missing_images") == 2
    assert "2 of 2 images are not in" in capsys.readouterr().err
    assert sample(tmp_path / "o", tmp_path / "job", *how, "--aspect_ratio", "4:3") == 2
    assert "no images of --aspect_ratio 4:3 (only 1-1, 8-5, 7-4, 16-9)" in capsys.readouterr().err
    Image.fromarray(np.full((40, 60, 3), (250, 10, 10), dtype=np.uint8)).save(crops / "a red wall.jpg")
    assert sample(tmp_path / "o", tmp_path / "job", *how, "--dimension", "camera_motion") == 0
    first = read_mp4(tmp_path / "o" / "a red wall, camera pans left-0.mp4")[:, 0]
    assert float(first[0].mean()) > 0.5 > -0.5 > float(first[2].mean()), "red, as the image"
    (base / "vbench2_i2v_full_info.json").write_text(json.dumps([motion]))
    assert sample(tmp_path / "o2", tmp_path / "job", *how) == 2
    assert "'a red wall, camera pans left' has no image_name" in capsys.readouterr().err
