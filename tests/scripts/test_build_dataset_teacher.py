"""From a teacher's checkpoint to shards to training, through the commands."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.data.latents import LatentShards
from rcm.encoders.umt5 import UMT5TextEncoder
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Guided
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.text_to_video import WholeVideoRecipe, whole_latents
from rcm.pipelines.wan_files import load_wan
from scripts import teacher_source, view_shards
from scripts.build_dataset import main
from tests.integration.entry import train_on
from tests.support.dist import run_ranks
from tests.support.tiny_checkpoint import FEW_STEP, LATENT_SHAPE, MANY_STEP, TEACHER, write_checkpoint
from tests.support.tiny_wan_files import WanFiles, expect_a_tiny_vae, write_wan_files

PROMPTS = ("a red circle moving left", "a blue square moving up", "a green circle moving right", "a red square moving down")
NUM = 5


def run(*words: object) -> int:
    return main([str(word) for word in (*words, "--device", "cpu")])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Checkpoints `teacher`, `student`, `causal`, and a prompt file."""
    folder = tmp_path_factory.mktemp("world")
    for name, recipe in (("teacher", replace(MANY_STEP, steps=2)), ("student", FEW_STEP), ("causal", TEACHER)):
        write_checkpoint(folder / name, recipe)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def words(world: Path, out: Path, *more: object) -> list[object]:
    """A build of NUM samples (a prompt twice) in shards of two."""
    given = ["--source", "teacher", "--teacher", world / "teacher", "--prompts", world / "prompts.txt"]
    return [*given, "--num", NUM, "--shard-size", 2, "--seed", 7, "--out", out, *more]


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.tar"))}


def test_samples_are_the_teachers_videos_and_train_a_student(world, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(*words(world, out)) == 0
    told = capsys.readouterr().out
    assert "5 samples in 3 shards" in told and "5 of 5 samples" in told and " left" in told
    shards = LatentShards(f"{out}/*.tar")
    batch = shards.fetch(range(NUM))
    assert batch.latents.shape == (NUM, *LATENT_SHAPE) and batch.cond.shape == (NUM, 8, 24)
    assert batch.prompts == [*PROMPTS, PROMPTS[0]] and batch.keys == [f"{i:09d}" for i in range(NUM)]
    assert not torch.equal(batch.latents[0], batch.latents[4])  # the same prompt with another seed
    model = open_checkpoint(world / "teacher")
    # the command that samples one prompt makes the same video from seed + number
    for number in (0, 3, 4):
        video = next(iter(model.stream([batch.prompts[number]], seed=7 + number)))
        torch.testing.assert_close(batch.latents[number], video.latents[0].to(torch.bfloat16).float(), rtol=0.02, atol=0.02)
    recipe = json.loads((out / "dataset.json").read_text())
    assert recipe["sampler"] | {"steps": 2, "guidance": 2.0, "shift": 5.0, "solver": "euler"} == recipe["sampler"]
    assert recipe["codec"]["name"] == "toy" and recipe["teacher"]["weights"] == "ema" and recipe["seed"] == 7
    more = ["data=toy_shards", "model.config.latent_hw=[4,4]"]
    assert train_on(out, tmp_path / "job", "toy_tf_c3-3", *more, iterations=3) == 0
    lines = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(math.isfinite(line["loss/tf"]) for line in lines)


def test_samples_do_not_depend_on_ranks_batch_or_stops(world, tmp_path, monkeypatch, capsys):
    whole, ranks, batched = tmp_path / "whole", tmp_path / "ranks", tmp_path / "batched"
    assert run(*words(world, whole, "--dtype", "fp32")) == 0
    before = tars(whole)
    (whole / "shard-000001.tar").unlink()
    (whole / "shard-000002.tar").write_bytes(before["shard-000002.tar"][:777])
    assert run(*words(world, whole, "--dtype", "fp32")) == 0
    assert tars(whole) == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert run(*words(world, ranks, "--dtype", "fp32", "--shard_size", 2, "--num_samples", NUM)) == 0
    assert tars(ranks) == before and "rank 1: 2 of 2 samples" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(*words(world, batched, "--dtype", "fp32", "--batch", 2)) == 0
    one, two = (LatentShards(f"{folder}/*.tar").fetch(range(NUM)).latents for folder in (whole, batched))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_another_recipe_in_the_same_folder_is_refused(world, tmp_path, capsys):
    assert run(*words(world, tmp_path / "data")) == 0
    before = tars(tmp_path / "data")
    for more, told in (
        (["--seed", 8], "seed: there 7, asked 8"),
        (["--num-steps", 3], "'steps': 2"),
        (["--weights", "reg"], "'weights': 'reg'"),
        (["--dtype", "fp32"], "dtype: there 'bfloat16', asked 'float32'"),
        (["--precision", "fp64"], "precision: there {'compute': 'float32'"),
    ):
        assert run(*words(world, tmp_path / "data", *more)) == 1
        assert told in (error := capsys.readouterr().err) and "choose another output folder" in error
    assert tars(tmp_path / "data") == before


def context_parallel(commands: list[list[str]]) -> list[int]:
    """Exit codes on a rank of an existing group."""
    os.environ.update(WORLD_SIZE="2", RANK=str(torch.distributed.get_rank()), LOCAL_RANK="0")
    return [main(command) for command in commands]


@pytest.mark.dist
def test_two_ranks_share_each_sample(world, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    more = ["--dtype", "fp32", "--precision", "fp32", "--device", "cpu"]
    assert run(*words(world, alone, *more)) == 0
    command = [str(word) for word in words(world, shared, *more, "--context_parallel_size", 2)]
    assert run_ranks(2, context_parallel, [command, [*command, "--seed", "8"]], tmp_path=tmp_path) == [[0, 1], [0, 1]]
    one, two = (LatentShards(f"{folder}/*.tar").fetch(range(NUM)).latents for folder in (alone, shared))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_negative_embedding_and_view(world, tmp_path, capsys):
    path = tmp_path / "negative.pt"
    assert run("--source", "teacher", "--teacher", world / "teacher", "--write_negative_embedding", path) == 0
    stored = torch.load(path, weights_only=True)
    assert stored.shape == (8, 24) and stored.dtype == torch.bfloat16 and stored[0].any() and not stored[1:].any()
    assert run("--source", "teacher", "--teacher", path, "--write_negative_embedding", path) == 1
    assert "is a file that --teacher reads" in capsys.readouterr().err and torch.load(path).shape == (8, 24)
    assert run(*words(world, tmp_path / "data")) == 0
    assert view_shards.main([str(tmp_path / "data" / "shard-000000.tar"), "--sheet", str(tmp_path / "s.png"), "--rows", "2"]) == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size[0] > 9 * 64
    (tmp_path / "data" / "dataset.json").write_text('{"codec": {"name": "other"}}')
    assert view_shards.main([str(tmp_path / "data" / "shard-000000.tar"), "--sheet", str(tmp_path / "s.png")]) == 1
    assert "'other'; choose --codec" in capsys.readouterr().err


@pytest.mark.parametrize(("launch", "index"), [({}, 0), ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1)])
def test_a_rank_takes_its_own_gpu(monkeypatch, launch, index):
    with ExitStack() as stack, pytest.raises(ConfigError, match="--device gpu7 cannot be used"):
        teacher_source._ranks(SimpleNamespace(context_parallel_size=1, device="gpu7"), stack)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(teacher_source, "check_device", lambda name: None)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        _, device = teacher_source._ranks(SimpleNamespace(context_parallel_size=1, device="cuda"), stack)
    # without a number torch.cuda.set_device refuses
    assert taken == [device] == [torch.device("cuda", index)]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> WanFiles:
    """Tiny files in the layout of the public ones."""
    return write_wan_files(tmp_path_factory.mktemp("assets"))


def wan_words(files: WanFiles, out: Path, *more: object) -> list[object]:
    given = ["--source", "teacher", "--dit_path", files.dit, "--model_size", "auto", "--text_encoder_path", files.text]
    shape = ["--size", "32x48", "--frames", 5, "--precision", "fp32", "--dtype", "fp32", "--num_steps", 3, "--seed", 11]
    return [*given, *shape, "--prompts", out.parent / "prompts.csv", "--out", out, *more]


def test_original_wan_files(published, tmp_path, capsys, monkeypatch):
    """Latents of the release's recipe from public layouts, without the VAE; the viewer reads
    that.
    """
    (tmp_path / "prompts.csv").write_text("id,prompt\n0,a red square moves left\n1,a cat\n")
    out = tmp_path / "data"
    assert run(*wan_words(published, out, "--write_negative_embedding", tmp_path / "negative.pt")) == 0
    batch = LatentShards(f"{out}/*.tar").fetch(range(2))
    assert batch.latents.shape == (2, 16, 2, 4, 6) and batch.cond.shape == (2, 512, 24)
    precision = Precision.preset("fp32")
    net = load_wan(published.dit, device="cpu", precision=precision)
    text = UMT5TextEncoder.from_files(published.text)
    assert torch.equal(torch.load(tmp_path / "negative.pt", weights_only=True), text.encode([text.negative_prompt])[0])
    embeddings, negative = (text.encode(words).float() for words in (batch.prompts, [text.negative_prompt]))
    torch.testing.assert_close(batch.cond, embeddings, rtol=0, atol=0)
    recipe = WholeVideoRecipe("ode", sigma_max=5000.0, steps=3, shift=3.0, guidance=5.0)
    guided = Guided(net, Condition(negative), 5.0)
    alone = whole_latents(guided, Condition(embeddings[1:]), recipe, shape=(1, 16, 2, 4, 6), generator=torch.Generator().manual_seed(12))
    torch.testing.assert_close(batch.latents[1:], alone, rtol=1e-4, atol=1e-4)
    expect_a_tiny_vae(monkeypatch)
    words = [out / "shard-000000.tar", "--sheet", tmp_path / "sheet.png", "--vae-path", published.vae]
    assert view_shards.main([str(word) for word in words]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 5 * 48
    capsys.readouterr()
    assert view_shards.main([str(word) for word in (*words[:-1], tmp_path / "no.pth")]) == 1
    assert "no.pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--model_size", "1.3B"], "1.3B"),
        (["--dit_path", "nowhere.pth"], "nowhere.pth"),
        (["--text_encoder_path", "nowhere.pth"], "nowhere.pth"),
        (["--size", "40x48"], "nearest is 32x48"),
        (["--frames", 6], "num_frames=5 or 9"),
        (["--random_weights"], "--model_size auto"),
    ],
)
def test_bad_wan_files(published, tmp_path, capsys, change, told):
    (tmp_path / "prompts.csv").write_text("prompt\na cat\n")
    assert run(*wan_words(published, tmp_path / "data", *change)) == 1
    assert told in capsys.readouterr().err and not list(tmp_path.glob("data/*.tar"))


def test_an_image_to_video_network_is_no_teacher(published, tmp_path, capsys):
    (tmp_path / "prompts.csv").write_text("prompt\na cat\n")
    assert run(*wan_words(published, tmp_path / "data", "--dit_path", published.high)) == 1
    assert "text-to-video network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--teacher", "student"], "is a few-step student"),
        (["--teacher", "causal"], "is causal"),
        (["--teacher", "nowhere"], "no checkpoint at"),
        (["--frames", 9], "leave out --frames"),
        (["--resolution", "720p"], "leave out --resolution"),
        (["--aspect_ratio", "1:1"], "leave out --aspect_ratio"),
        (["--model_size", "1.3B"], "leave out --model_size"),
        (["--prompts", "none.txt"], "no prompt file"),
        (["--prompts", "gap.txt"], "gap.txt:2 is empty"),
        (["--prompts", "long.txt"], "prompt 1: prompt of 9 words"),
        (["--context_parallel_size", 3], "must divide the 1 ranks"),
    ],
)
def test_bad_requests_say_what_to_change(world, tmp_path, capsys, monkeypatch, more, told):
    monkeypatch.chdir(world)
    (world / "gap.txt").write_text("a\n\nb")
    (world / "long.txt").write_text("short\n" + "word " * 9)
    assert run(*words(world, tmp_path / "out", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error
    assert not list(tmp_path.glob("out/*.tar"))


def test_progress_tells_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 12.0, 400.0])
    monkeypatch.setattr(teacher_source.time, "monotonic", lambda: next(clock))
    progress = teacher_source.Progress(label="rank 3: ")
    for done in (1, 2, 100):
        progress(done, 100)
    assert (
        capsys.readouterr().out
        == "rank 3: 2 of 100 samples, 6.00 s each, 9.8 min left\nrank 3: 100 of 100 samples, 4.00 s each, 0 s left\n"
    )
