"""One file out of a DCP checkpoint: names, weights, dtype, self-description, and the public
command.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from rcm.core.errors import CheckpointError, ConfigError
from rcm.train import describe as describing
from rcm.train.export import describe, export, model_directory, read_weights
from rcm.train.state import TrainState
from scripts.dcp_to_pth import main
from tests.train.run_support import launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    job = tmp_path_factory.mktemp("job")
    trainer = launch(job, max_iter=4, precision="fp32")
    trainer.run()
    return job, trainer.state


def test_every_way_to_name_a_checkpoint_finds_its_weights(trained: tuple[Path, TrainState]) -> None:
    job, _ = trained
    model = job / "checkpoints" / "iter_000000004" / "model"
    assert model_directory(job) == model_directory(model.parent) == model_directory(model) == model
    with pytest.raises(CheckpointError, match="checkpoints is not a DCP checkpoint"):
        model_directory(job / "checkpoints")
    assert describe(model).iteration == describe(job).iteration == 4 and describe(job).stage == "toy"


@pytest.mark.parametrize("weights", ["ema", "reg", "fake_score"])
def test_selected_weights_arrive_exactly(trained: tuple[Path, TrainState], weights: str) -> None:
    job, state = trained
    found = read_weights(job, weights=weights)
    role = "fake_score" if weights == "fake_score" else "student"
    expected = state.ema.shadow if weights == "ema" else state.roles[role].net.state_dict()
    assert sorted(found) == sorted(expected) and all(torch.equal(found[k], expected[k]) for k in expected)
    if weights == "ema":
        assert not torch.equal(found["head.head.weight"], state.roles["student"].net.head.head.weight)


def test_values_beyond_float16_are_not_made_infinite(tmp_path: Path) -> None:
    dcp.save({"net.a": torch.tensor([1e5, -2.0])}, checkpoint_id=str(tmp_path / "model"), no_dist=True)
    assert read_weights(tmp_path, weights="reg", dtype=torch.bfloat16)["a"].isfinite().all()
    with pytest.raises(CheckpointError, match=r"net\.a has values up to 1e\+05, beyond float16's 65504; convert with --dtype"):
        export(tmp_path, tmp_path / "a.pt", weights="reg", dtype=torch.float16)
    assert not (tmp_path / "a.pt").exists()


def test_safetensors_carry_the_description(trained: tuple[Path, TrainState], tmp_path: Path) -> None:
    job, state = trained
    target = export(job, tmp_path / "deep" / "student.safetensors", dtype=torch.float32)
    with safe_open(target, framework="pt") as file:
        assert json.loads(file.metadata()["rcm"])["stage"] == "toy"
        assert torch.equal(file.get_tensor("net.head.head.weight"), state.ema.shadow["head.head.weight"])
    assert describe(target).iteration == 4
    assert sorted(p.name for p in target.parent.iterdir()) == ["student.safetensors", "student.safetensors.json"]


def test_the_public_command_writes_averaged_weights_in_bf16(
    trained: tuple[Path, TrainState], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    job, state = trained
    model = job / "checkpoints" / "iter_000000004" / "model"
    assert main(["--dcp_checkpoint_dir", str(model), "--save_path", str(tmp_path / "out.pth")]) == 0
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(k.startswith("net.") and v.dtype == torch.bfloat16 for k, v in found.items())
    assert torch.equal(found["net.head.head.weight"], state.ema.shadow["head.head.weight"].bfloat16())
    assert main(["--dcp_checkpoint_dir", str(tmp_path), "--save_path", str(tmp_path / "x.pth")]) == 1
    assert main(["--dcp_checkpoint_dir", str(model), "--save_path", str(tmp_path / "x.bin")]) == 1
    errors = capsys.readouterr().err
    assert "is not a DCP checkpoint" in errors and "must end in" in errors and not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize(("weights", "held"), [("ema", "ema"), ("reg", "live"), ("fake_score", "fake_score")])
def test_an_exported_file_says_which_weights_it_holds(trained: tuple[Path, TrainState], tmp_path: Path, weights: str, held: str) -> None:
    """In both places; the rest of the description is the run's."""
    job, _ = trained
    target = export(job, tmp_path / "x.safetensors", weights=weights)
    told = describe(target)
    assert told.extra["weights"] == held and told == describe(job).holding(weights)
    with safe_open(target, framework="pt") as file:
        assert json.loads(file.metadata()["rcm"])["extra"]["weights"] == held


@pytest.mark.parametrize("step", range(1, 9))
def test_weights_never_stand_beside_the_description_of_others(
    trained: tuple[Path, TrainState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Whichever rename, removal or flush it is stopped at, and nothing temporary is left."""
    job, _ = trained
    target, calls = export(job, tmp_path / "x.pt", weights="ema"), []

    def refusing(owner: object, word: str) -> None:
        real = getattr(owner, word)

        def call(*arguments: object, **options: object) -> object:
            calls.append(word)
            if len(calls) == step:
                raise OSError(5, "Input/output error", str(target))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, word, call)

    for word in ("replace", "fsync"):
        refusing(os, word)
    refusing(describing, "discard")
    with contextlib.suppress(OSError):
        export(job, target, weights="reg")
    monkeypatch.undo()
    held = torch.load(target)
    is_new = torch.equal(held["net.head.head.weight"], read_weights(job, weights="reg", dtype=torch.bfloat16)["head.head.weight"])
    told = describe(target)
    assert told is None or told.extra["weights"] == ("live" if is_new else "ema")
    if step > 1:
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".writing", ".locked"))]


def test_a_folder_in_the_place_of_the_file_stays(trained: tuple[Path, TrainState], tmp_path: Path) -> None:
    (tmp_path / "x.pt").mkdir()
    (tmp_path / "x.pt" / "precious").touch()
    with pytest.raises(OSError, match=r"is a folder: '.*x\.pt'"):
        export(trained[0], tmp_path / "x.pt")
    assert (tmp_path / "x.pt" / "precious").exists()


def test_no_older_description_stays_beside_weights_without_one(tmp_path: Path) -> None:
    dcp.save({"net_ema.a": torch.ones(2)}, checkpoint_id=str(tmp_path / "model"), no_dist=True)
    (tmp_path / "x.pt.json").write_text("{}")
    export(tmp_path, tmp_path / "x.pt")
    assert describe(tmp_path / "x.pt") is None


def test_names_that_wrappers_leave_are_removed(tmp_path: Path) -> None:
    """rcm's trainer wraps blocks and head for recomputation, and the names reach its
    checkpoints.
    """
    wrapped = {
        "net_ema.blocks.0._checkpoint_wrapped_module.modulation": torch.ones(2),
        "net_ema.head._extra_state": torch.zeros(0),
        "net.x": torch.zeros(1),
    }
    dcp.save(wrapped, checkpoint_id=str(tmp_path / "model"), no_dist=True)
    assert sorted(read_weights(tmp_path)) == ["blocks.0.modulation"]


def test_absent_weights_and_unknown_names_are_errors(tmp_path: Path) -> None:
    trainer = launch(tmp_path, max_iter=1)
    trainer.state.roles.pop("fake_score")
    trainer.state.ema = None
    trainer.checkpointer.save(trainer.state)
    with pytest.raises(CheckpointError, match=r"no net_ema\.\* weights \(it has net\)"):
        read_weights(tmp_path)
    with pytest.raises(ConfigError, match="ema, reg, fake_score"):
        read_weights(tmp_path, weights="teacher")
