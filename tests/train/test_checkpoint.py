"""Checkpoints on one rank: what is refused, what survives a crash or a full disk, what is kept."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from rcm.core import files
from rcm.core.errors import CheckpointError
from rcm.parallel.mesh import ParallelDims
from rcm.train import checkpoint
from rcm.train.checkpoint import Checkpointer
from rcm.train.describe import Description
from tests.support.toy_method import CONFIG, make_run
from tests.train.run_support import DESCRIPTION, everything, launch, same

ONE = ParallelDims()


@contextmanager
def tiny_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system refuses the write as it does on a full
    disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A job with checkpoints at 2 and 4."""
    launch(tmp_path, max_iter=4, save_iter=2).run()
    return tmp_path


def load(job: Path, *, description: Description = DESCRIPTION, **options):
    _, state = make_run(dims=ONE, precision="fp64", **options)
    Checkpointer(job, dims=ONE, description=description).load(state)
    return state


def test_layout_and_keys_are_those_that_users_know(saved: Path) -> None:
    checkpoints = saved / "checkpoints"
    assert (checkpoints / "latest_checkpoint.txt").read_text() == "iter_000000004\n"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["iter_000000002", "iter_000000004", "latest_checkpoint.txt"]
    newest = checkpoints / "iter_000000004"
    assert sorted(p.name for p in newest.iterdir()) == ["model", "optim_fake_score", "optim_net", "rcm.json", "scheduler", "trainer"]
    assert all((newest / part / ".metadata").is_file() for part in ("model", "optim_net", "optim_fake_score", "scheduler", "trainer"))
    keys = torch.distributed.checkpoint.FileSystemReader(str(newest / "model")).read_metadata().state_dict_metadata
    assert {k.split(".")[0] for k in keys} == {"net", "net_ema", "net_fake_score"} and "net.blocks.0.self_attn.q.weight" in keys
    description = Description.read(newest / "rcm.json")
    assert description == DESCRIPTION.at(4) or asdict(description) == json.loads(json.dumps(asdict(DESCRIPTION.at(4))))


def test_before_its_first_update_a_role_has_no_optimiser_state(tmp_path: Path) -> None:
    """Saved at iteration 1, before the fake score was ever updated: the resumed run must not invent
    a step for it.
    """
    whole = launch(tmp_path / "whole", max_iter=4)
    whole.run()
    launch(tmp_path / "parts", max_iter=1).run()
    second = launch(tmp_path / "parts", max_iter=4)
    second.run()
    assert same(everything(whole.state), everything(second.state))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_is_an_os_error_with_the_path_and_changes_nothing(saved: Path, asynchronous: bool) -> None:
    trainer = launch(saved, max_iter=8, asynchronous=asynchronous)
    checkpointer = trainer.checkpointer
    trainer.state.iteration = 6
    before = everything(trainer.state)

    def save() -> None:
        checkpointer.save(trainer.state, loader=trainer.loader)
        checkpointer.wait()

    with tiny_disk(20_000), pytest.raises(OSError, match="previous checkpoint is untouched") as caught:
        save()
    assert "iter_000000006" in str(caught.value)
    assert same(before, everything(trainer.state))
    assert checkpointer.latest().name == "iter_000000004" and load(saved).iteration == 4
    save()
    assert checkpointer.latest().name == "iter_000000006"


def test_unwritable_folder_is_an_os_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("a file where the job folder should be")
    trainer = launch(tmp_path / "other", max_iter=1)
    checkpointer = Checkpointer(tmp_path / "job", dims=ONE, description=DESCRIPTION)
    with pytest.raises(OSError, match="job"):
        checkpointer.save(trainer.state)


def test_asynchronous_save_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    """Weights that change right after `save` returns do not change the file."""
    trainer = launch(tmp_path, max_iter=3, asynchronous=True)
    trainer.run()
    trainer.state.iteration = 7
    before = everything(trainer.state)
    trainer.checkpointer.save(trainer.state)
    with torch.no_grad():
        for slot in trainer.state.roles.values():
            for p in slot.net.parameters():
                p.add_(1.0)
            for values in slot.optimizer.state.values():
                values["exp_avg_sq"].mul_(0)
    trainer.checkpointer.wait()
    assert same(everything(load(tmp_path)), before)


def test_memory_of_asynchronous_copies_is_taken_once(tmp_path: Path) -> None:
    """The second copy lies where the first one did, and both saves hold their own moment."""
    trainer = launch(tmp_path, max_iter=2, asynchronous=True)
    trainer.run()
    keeper, places, before = trainer.checkpointer, [], []
    for iteration in (5, 6):
        trainer.state.iteration = iteration
        with torch.no_grad():
            for p in trainer.state.roles["student"].net.parameters():
                p.add_(iteration)
        before.append(everything(trainer.state))
        keeper.save(trainer.state)
        copies = keeper._copies["model"].copier._cached_storage_mapping
        places.append(sorted(copy.data_ptr() for copy in copies.values()))
    keeper.wait()
    assert len(places[0]) > 10 and places[0] == places[1]
    for iteration, truth in zip((5, 6), before, strict=True):
        (tmp_path / "checkpoints" / "latest_checkpoint.txt").write_text(f"iter_{iteration:09d}\n")
        assert same(everything(load(tmp_path)), truth)


def test_another_network_is_named(saved: Path) -> None:
    other = replace(DESCRIPTION, network={**asdict(CONFIG), "dim": 64, "num_layers": 3}, network_name="1.3B")
    with pytest.raises(CheckpointError, match=r"'toy', this run has '1\.3B' \(dim: 32 there, 64 here, num_layers: 2 there, 3 here\)"):
        load(saved, description=other)


def test_missing_and_unexpected_keys_are_named_before_anything_is_read(saved: Path) -> None:
    _, state = make_run(dims=ONE, precision="fp64", roles=("student",))
    before = everything(state)
    checkpointer = Checkpointer(saved, dims=ONE, description=DESCRIPTION)
    with pytest.raises(CheckpointError, match="unexpected key.*net_fake_score"):
        checkpointer.load(state)
    assert same(before, everything(state)) and state.iteration == 0
    _, full = make_run(dims=ONE, precision="fp64")
    full.roles["student"].net.register_buffer("extra", torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"missing 1 key\(s\): net\.extra"):
        Checkpointer(saved, dims=ONE, description=DESCRIPTION).load(full)


@pytest.mark.parametrize("part", ["model", "optim_net", "trainer"])
def test_damaged_files_are_named(saved: Path, part: str) -> None:
    folder = saved / "checkpoints" / "iter_000000004" / part
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(CheckpointError, match="iter_000000004"):
        load(saved)


def test_absent_parts_and_pointers_are_named(saved: Path) -> None:
    newest = saved / "checkpoints" / "iter_000000004"
    shutil.rmtree(newest / "optim_net")
    with pytest.raises(CheckpointError, match="optim_net is not a DCP checkpoint"):
        load(saved)
    (newest / "rcm.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"rcm\.json"):
        load(saved)
    shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match="iter_000000004, which does not exist"):
        load(saved)
    assert Checkpointer(saved / "empty", dims=ONE, description=DESCRIPTION).load(make_run(dims=ONE)[1]) is None


@pytest.mark.slow
def test_keep_last_and_saving_an_iteration_twice(tmp_path: Path) -> None:
    trainer = launch(tmp_path, max_iter=5, save_iter=1, keep_last=2)
    trainer.run()
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("iter_*"))
    assert names == ["iter_000000004", "iter_000000005"]
    trainer.checkpointer.save(trainer.state, loader=trainer.loader)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [*names, "latest_checkpoint.txt"]
    assert load(tmp_path).iteration == 5


def test_description_of_a_newer_format_or_with_unknown_fields_is_refused() -> None:
    text = json.loads(DESCRIPTION.to_json())
    with pytest.raises(CheckpointError, match="format 99"):
        Description.from_json(json.dumps({**text, "format": 99}), source="here")
    with pytest.raises(CheckpointError, match="here: sorcery is not known to this version"):
        Description.from_json(json.dumps({**text, "sorcery": 1}), source="here")
    assert Description.from_json(DESCRIPTION.to_json(), source="").to_json() == DESCRIPTION.to_json()


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system, while somebody reads it: nothing half of it keeps its name, and
    a later save removes it.
    """
    removed = checkpoint.discard

    def busy(path: Path) -> None:
        if "iter_000000001" in path.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        removed(path)

    monkeypatch.setattr(checkpoint, "discard", busy)
    launch(tmp_path, max_iter=3, save_iter=1, keep_last=1).run()
    names = lambda: sorted(path.name for path in (tmp_path / "checkpoints").iterdir())  # noqa: E731
    assert names() == [".replaced_iter_000000001", "iter_000000003", "latest_checkpoint.txt"]
    monkeypatch.undo()
    launch(tmp_path, max_iter=4, save_iter=1, keep_last=1).run()
    assert names() == ["iter_000000004", "latest_checkpoint.txt"]


def test_only_what_saves_made_is_removed_by_later_ones(tmp_path: Path) -> None:
    kept = tmp_path / "checkpoints" / "iter_000000001_by_hand"
    kept.mkdir(parents=True)
    launch(tmp_path, max_iter=2, save_iter=1, keep_last=1).run()
    assert sorted(p.name for p in kept.parent.iterdir()) == [kept.name, "iter_000000002", "latest_checkpoint.txt"]


def test_an_iteration_saved_again_that_cannot_be_placed_leaves_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not swap folders in one step, between two renames neither has it."""
    trainer, replace = launch(tmp_path, max_iter=1), os.replace
    trainer.run()

    def refused(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".writing_iter"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match="previous checkpoint is untouched"):
        trainer.checkpointer.save(trainer.state, loader=trainer.loader)
    monkeypatch.undo()
    assert load(tmp_path).iteration == 1


def test_a_job_and_what_is_inside_are_its_newest_checkpoint(saved: Path) -> None:
    inside = saved / "checkpoints"
    for path, iteration in ((saved, 4), (inside / "iter_000000002", 2), (inside / "iter_000000002" / "model", 2)):
        _, state = make_run(dims=ONE, precision="fp64")
        assert Checkpointer(saved / "other", dims=ONE, description=DESCRIPTION).load(state, path=path) == inside / f"iter_{iteration:09d}"
        assert state.iteration == iteration
    with pytest.raises(CheckpointError, match=r"checkpoints is no checkpoint; give its iter_\* folder, or the folder of the job"):
        Checkpointer(saved / "other", dims=ONE, description=DESCRIPTION).load(state, path=inside)
