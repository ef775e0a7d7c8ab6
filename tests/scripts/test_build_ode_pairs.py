"""From a teacher's checkpoint to trajectories to two iterations of TF-KD and DF-KD, through the
commands.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rcm.data.latents import LatentShards
from scripts.build_dataset import main as build_dataset
from scripts.build_ode_pairs import main
from tests.integration.entry import train_on
from tests.support.tiny_checkpoint import LATENT_SHAPE, MANY_STEP, STUDENT, TEACHER, write_checkpoint

CAUSAL_TEACHER = replace(TEACHER, pattern="c3-3")
NUM = 5


def run(*words: object) -> int:
    return main([str(word) for word in (*words, "--device", "cpu")])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Teachers `bidirectional` and `causal`, a `student`, and `clean` shards of five videos."""
    folder = tmp_path_factory.mktemp("world")
    for name, recipe in (("bidirectional", MANY_STEP), ("causal", CAUSAL_TEACHER), ("student", STUDENT)):
        write_checkpoint(folder / name, recipe)
    words = ["--num", str(NUM), "--frames", "11", "--text-dim", "24", "--shard-size", "3", "--seed", "4", "--out", str(folder / "clean")]
    assert build_dataset(words) == 0
    return folder


def words(world: Path, kind: str, out: Path, *more: object) -> list[object]:
    """The build of `kind` with shards of two."""
    given = ["--latents", world / "clean" / "*.tar"] if kind == "causal" else ["--num", NUM]
    return ["--teacher", world / kind, *given, "--shard-size", 2, "--dtype", "fp32", "--out", out, *more]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.tar"))


def train(kind: str, data: Path, job: Path, *more: str) -> int:
    return train_on(data, job, f"toy_{kind}_c3-3", *more)


@pytest.mark.parametrize(("kind", "method"), [("bidirectional", "df_kd"), ("causal", "tf_kd")])
def test_trajectories_train_their_method(world, tmp_path, capsys, kind, method):
    data = tmp_path / "pairs"
    assert run(*words(world, kind, data)) == 0
    assert "3 shards of trajectories" in capsys.readouterr().out
    batch = LatentShards(f"{data}/*.tar").fetch(range(NUM))
    assert batch.trajectory.shape == (NUM, 5, *LATENT_SHAPE) and batch.cond.shape == (NUM, 8, 24)
    assert batch.trajectory[:, 1].std() == pytest.approx(1, abs=0.05)  # noise at t = 1
    clean = LatentShards(f"{world}/clean/*.tar").fetch(range(NUM))
    if kind == "causal":
        assert torch.equal(batch.latents, clean.latents) and batch.prompts == clean.prompts
    else:
        assert torch.equal(batch.latents, batch.trajectory[:, 0]) and len(set(batch.prompts)) > 1
    assert train(method, data, tmp_path / "job") == 0
    records = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(math.isfinite(record[f"loss/{method}"]) for record in records)


def test_shards_of_another_run_are_refused(world, tmp_path, capsys):
    data, times = tmp_path / "pairs", "model.config.kd_timesteps="
    assert run(*words(world, "causal", data, "--times", "1,15/16", "1/2")) == 0
    assert train("tf_kd", data, tmp_path / "equal", times + "[1.0,0.9375,0.5]") == 0
    single = ["model.config.first_chunk_t=1", "model.config.chunk_t=1"]
    for kind, changes, told in (
        ("tf_kd", [times + "[1.0,0.75,0.5]"], ("kd_timesteps=[1.0, 0.9375, 0.5]", "kd_timesteps=[1.0, 0.75, 0.5]")),
        ("tf_kd", [times + "[1.0,0.9375,0.5]", *single], ("pattern=c3-3", "pattern=c1-1")),
        ("df_kd", [times + "[1.0,0.9375,0.5]"], ("training_type=tf_kd", "training_type=df_kd")),
    ):
        capsys.readouterr()
        assert train(kind, data, tmp_path / "other", *changes) != 0
        error = capsys.readouterr().err
        assert all(part in error for part in told), error
    # shards from elsewhere: their number of states is all there is to see
    (data / "dataset.json").unlink()
    assert train("tf_kd", data, tmp_path / "other") != 0
    assert "trajectories of 5 states" in (error := capsys.readouterr().err) and "got 4 states" in error


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_a_stopped_build_continues_with_any_batch_and_in_parts(world, tmp_path, capsys, kind):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*words(world, kind, whole)) == 0
    before = [path.read_bytes() for path in shards(whole)]
    shards(whole)[1].unlink()
    shards(whole)[1].write_bytes(before[2][:999])
    assert run(*words(world, kind, whole)) == 0
    assert [path.read_bytes() for path in shards(whole)] == before
    for part in ("1/2", "0/2"):
        assert run(*words(world, kind, parts, "--batch", 1, "--part", part)) == 0
        assert [path.name for path in shards(parts)][:1] == ["shard-000001.tar" if part == "1/2" else "shard-000000.tar"]
    assert [path.name for path in shards(parts)] == [path.name for path in shards(whole)]
    one, other = (LatentShards(f"{folder}/*.tar").fetch(range(NUM)) for folder in (whole, parts))
    torch.testing.assert_close(other.trajectory, one.trajectory, rtol=1e-3, atol=1e-3)
    assert torch.equal(other.trajectory[:, 1], one.trajectory[:, 1]) and other.prompts == one.prompts
    assert run(*words(world, kind, whole, "--seed", 1)) == 1
    assert "ode: there" in capsys.readouterr().err


def test_guidance_grid_and_prompts_can_be_chosen(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n\na blue square moving up\n")
    plain = ["--teacher", world / "bidirectional", "--prompts", tmp_path / "prompts.txt", "--dtype", "fp32"]
    found = {}
    for name, more in {"own": [], "unguided": ["--guidance", 1], "finer": ["--steps", 9], "shifted": ["--shift", 2]}.items():
        assert run(*plain, *more, "--out", tmp_path / name) == 0
        found[name] = LatentShards(f"{tmp_path / name}/*.tar").fetch(range(2))
    assert found["own"].prompts == ["a red circle moving left", "a blue square moving up"]
    for name in ("unguided", "finer", "shifted"):
        assert torch.equal(found[name].trajectory[:, 1], found["own"].trajectory[:, 1])
        assert (found[name].latents - found["own"].latents).abs().max() > 1e-3
    assert len(json.loads((tmp_path / "own" / "dataset.json").read_text())["kd_timesteps"]) == 4


@pytest.mark.parametrize(
    ("kind", "more", "told"),
    [
        ("bidirectional", ["--latents", "*.tar"], "leave out --latents"),
        ("causal", [], "give --latents"),
        ("causal", ["--latents", "nothing/*.tar"], "--latents: no shard matches"),
        ("causal", ["--latents", "CLEAN", "--prompts", "x"], "leave out --prompts"),
        ("student", ["--latents", "CLEAN"], "no ODE to follow"),
        ("nothing", [], "no checkpoint at"),
        ("bidirectional", ["--times", "1/2", "3/4"], "must decrease strictly, got 0.75 after 0.5"),
        ("bidirectional", ["--times", "half"], "cannot read times"),
        ("bidirectional", ["--steps", 0], "--steps"),
        ("bidirectional", ["--prompts", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_requests_say_what_to_change(world, tmp_path, capsys, kind, more, told):
    more = [world / "clean" / "*.tar" if word == "CLEAN" else word for word in more]
    assert run("--teacher", world / kind, "--out", tmp_path / "x", *more) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert not list(tmp_path.glob("x/*.tar"))


def test_a_part_that_does_not_exist_is_a_usage_error(world, capsys):
    with pytest.raises(SystemExit) as caught:
        run("--teacher", world / "causal", "--out", "x", "--part", "4/4")
    assert caught.value.code == 2 and "I/N" in capsys.readouterr().err
