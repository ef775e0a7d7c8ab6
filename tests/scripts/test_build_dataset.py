from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rcm.data.latents import LatentShards
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.pipelines.clip_folder import find_clips, plan_windows, read_windows
from rcm.pipelines.video_io import resize_frame, to_uint8, write_mp4
from rcm.worlds.toy_codec import NATURAL, ToyCodec
from rcm.worlds.toy_latents import ToyLatents
from rcm.worlds.toy_scores import ToyScorer
from rcm.worlds.toy_text import ToyTextEncoder
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig
from scripts import build_dataset
from scripts.build_dataset import main
from tests.support.stand_in_codec import StandInCodec
from tests.support.tiny_umt5 import TINY, save_umt5


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_toy_shards_are_the_toy_world(tmp_path, capsys):
    assert run("--source", "toy", "--num", 100, "--out", tmp_path / "set", "--shard-size", 80, "--dtype", "fp32", "--seed", 5) == 0
    assert "100 samples in 2 shards" in capsys.readouterr().out
    shards = LatentShards(str(tmp_path / "set" / "shard-{000000..000001}.tar"), latent_channels=24, text_shape=(8, 64))
    memory = ToyLatents(ToyWorld(), ToyCodec(), ToyTextEncoder(), num=100, seed=5)
    stored, told = shards.fetch(range(100)), memory.fetch(range(100))
    assert torch.equal(stored.latents, told.latents) and torch.equal(stored.cond, told.cond)
    assert stored.prompts == told.prompts and stored.keys == told.keys


def test_stored_half_precision_still_scores_full_marks(tmp_path):
    assert run("--num", 96, "--out", tmp_path, "--shard-size", 96) == 0
    batch = LatentShards(str(tmp_path / "*.tar")).fetch(range(96))
    scores = ToyScorer(ToyWorld()).score(ToyCodec().decode(batch.latents), batch.prompts)
    assert scores.joint == 1 and scores.score > 95


def test_a_harder_world_and_captionless_samples(tmp_path):
    words = ["--num", 20, "--turns", 1, "--boundary", "bounce", "--size", "24x20", "--frames", 9, "--empty-prompts", 0.25, "--text-len", 9]
    assert run(*words, "--out", tmp_path) == 0
    batch = LatentShards(str(tmp_path / "*.tar")).fetch(range(20))
    assert batch.latents.shape == (20, 24, 5, 12, 10) and batch.cond.shape[1:] == (9, 64)
    assert batch.prompts.count("") == 5
    world = ToyWorld(replace(ToyWorldConfig.at_size(24, 20, num_frames=9), turns=1, boundary="bounce"))
    captions = world.captions(world.scenes(20, seed=0))
    assert all(prompt in ("", caption) for prompt, caption in zip(batch.prompts, captions, strict=True))


def test_a_stopped_build_continues_and_another_is_refused(tmp_path, capsys):
    words = ["--num", 12, "--shard-size", 4, "--out", tmp_path]
    assert run(*words) == 0
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.tar"))]
    (tmp_path / "shard-000001.tar").unlink()
    assert run(*words) == 0
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.tar"))] == before
    assert run(*words, "--seed", 1) == 1
    assert "seed: there 0, asked 1" in capsys.readouterr().err


def test_shards_of_real_files(tmp_path, capsys):
    """Two generated mp4s: latents decode to the resized frames, captions come from the sidecar or
    the name.
    """
    world = ToyWorld(ToyWorldConfig.at_size(32, 32, num_frames=24))
    videos = world.render(world.scenes(2, seed=0))
    write_mp4(tmp_path / "in" / "first_clip.mp4", videos[0], fps=8, crf=1)
    write_mp4(tmp_path / "in" / "second.mp4", videos[1], fps=8, crf=1)
    (tmp_path / "in" / "second.txt").write_text("a told caption")
    words = [
        "--source",
        "videos",
        "--input",
        tmp_path / "in",
        "--size",
        "16x16",
        "--frames",
        9,
        "--frame-stride",
        2,
        "--hop",
        3,
        "--dtype",
        "fp32",
    ]
    assert run(*words, "--out", tmp_path / "out", "--shard-size", 3) == 0
    shards = LatentShards(str(tmp_path / "out" / "*.tar"))
    batch = shards.fetch(range(len(shards)))
    # starts 0, 3, 6 of 24 frames, windows of 17
    assert batch.prompts == ["first clip"] * 3 + ["a told caption"] * 3
    assert batch.latents.shape == (6, 24, 5, 8, 8)
    pixels = NATURAL.decode(batch.latents)
    frames = to_uint8(videos[1, :, 3:20:2]).permute(1, 2, 3, 0)
    told = torch.stack([resize_frame(frame, height=16, width=16) for frame in frames], dim=1)
    assert (pixels[4] - told).abs().mean() < 0.05
    recipe = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert recipe["windows"][4] == "second.mp4:3" and recipe["frame_stride"] == 2
    assert run(*words, "--out", tmp_path / "out", "--shard-size", 3) == 0
    assert "6 samples in 2 shards" in capsys.readouterr().out


def test_real_files_as_wan_latents(tmp_path, monkeypatch):
    """Frames through the codec that --vae_path names, captions through umT5; stretched to cover,
    cut at the centre.
    """
    codec = StandInCodec()
    asked = []
    opened = SimpleNamespace(from_file=lambda path, *, device: asked.append((path, device)) or codec)
    monkeypatch.setattr(build_dataset, "WanVAECodec", opened)
    world = ToyWorld(ToyWorldConfig.at_size(32, 48, num_frames=12))
    write_mp4(tmp_path / "in" / "a_red_cat.mp4", world.render(world.scenes(1, seed=0))[0], fps=8, crf=1)
    umt5 = save_umt5(tmp_path / "umt5")
    words = ["--source", "videos", "--codec", "wan_vae", "--input", tmp_path / "in", "--size", "32x32", "--frames", 5, "--dtype", "fp32"]
    words += ["--vae_path", "vae.pth", "--text_encoder_path", umt5, "--device", "cpu"]
    assert run(*words, "--out", tmp_path / "out") == 0
    assert asked == [(Path("vae.pth"), torch.device("cpu"))]
    shards = LatentShards(str(tmp_path / "out" / "*.tar"), text_shape=(512, TINY.dim))
    batch = shards.fetch(range(len(shards)))
    assert batch.prompts == ["a red cat"] * 2 and batch.latents.shape == (2, 16, 2, 4, 4)
    (first, _) = read_windows(plan_windows(find_clips(tmp_path / "in"), num_frames=5, stride=1), height=32, width=32)
    assert torch.allclose(batch.latents[0], codec.encode(first[None])[0], atol=1e-6)
    assert torch.equal(batch.text[0], UMT5TextEncoder.from_files(umt5).encode(["a red cat"])[0].float())
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["codec"] == {"name": "wan_vae"}


def test_captions_are_encoded_shard_by_shard(tmp_path, monkeypatch):
    """512 rows of 4096 are 4 MB per caption: those of a large folder do not fit in memory
    together.
    """
    monkeypatch.setattr(build_dataset, "WanVAECodec", SimpleNamespace(from_file=lambda path, *, device: StandInCodec()))
    encode, asked = UMT5TextEncoder.encode, []
    monkeypatch.setattr(
        UMT5TextEncoder, "encode", lambda self, prompts: asked.append((len(list(out.glob("*.tar"))), prompts)) or encode(self, prompts)
    )
    for name in "ab":
        write_mp4(tmp_path / "in" / f"{name}.mp4", torch.zeros(3, 5, 32, 32), fps=8)
    out = tmp_path / "out"
    words = ["--source", "videos", "--codec", "wan_vae", "--input", tmp_path / "in", "--size", "32x32", "--frames", 5, "--shard-size", 1]
    words += ["--text_encoder_path", save_umt5(tmp_path / "umt5"), "--device", "cpu", "--out", out]
    assert run(*words) == 0 and asked == [(0, ["a"]), (1, ["b"])]
    assert run(*words) == 0 and len(asked) == 2, "nothing is left to do"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num", 4], "--out"),
        (
            ["--source", "videos", "--codec", "wan_vae", "--input", "short", "--size", "32x32", "--device", "gpu7", "--out", "x"],
            "--device gpu7",
        ),
        (["--source", "videos", "--input", "wordy", "--frames", 5, "--shard-size", 1, "--out", "x"], "text_len=8"),
        (["--source", "teacher", "--out", "x"], "--prompts"),
        (["--source", "videos", "--out", "x"], "--input"),
        (["--source", "videos", "--input", "empty", "--out", "x"], "no .mp4 file under"),
        (["--source", "videos", "--input", "broken", "--out", "x"], "cannot decode"),
        (["--source", "videos", "--input", "short", "--out", "x"], "has 5 frames, a window needs 17"),
        (["--source", "videos", "--input", "wordy", "--frames", 5, "--out", "x"], "text_len=8"),
        (["--num", 4, "--frames", 16, "--out", "x"], "num_frames=15 or 17"),
        (["--num", 4, "--codec", "wan_vae", "--out", "x"], "for real videos"),
        (["--source", "videos", "--codec", "wan_vae", "--input", "short", "--frames", 6, "--out", "x"], "num_frames=5 or 9"),
        (["--source", "videos", "--codec", "wan_vae", "--input", "short", "--size", "40x32", "--out", "x"], "40x32"),
        (["--source", "videos", "--codec", "wan_vae", "--input", "short", "--size", "32x32", "--out", "x"], "Wan2.1_VAE.pth"),
        (["--num", 4, "--size", "17x16", "--out", "x"], "spatial_stride=2"),
    ],
)
def test_bad_requests_say_what_to_change(tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"junk" * 99)
    flat = torch.zeros(3, 5, 16, 16)
    if "short" in words:
        write_mp4(tmp_path / "short" / "a.mp4", flat, fps=8)
    if "wordy" in words:
        write_mp4(tmp_path / "wordy" / "one_two_three_four_five_six_seven_eight.mp4", flat, fps=8)
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error
    assert not list(tmp_path.glob("x/*.tar"))


def test_wrong_size_word_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--size", "big")
    assert caught.value.code == 2 and "HEIGHTxWIDTH" in capsys.readouterr().err
