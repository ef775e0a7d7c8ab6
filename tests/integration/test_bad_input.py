"""What a user can get wrong, at the training command: one sentence that names the thing and the
knob, exit code 1 or 2, nothing lost.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.entry import everything, launch, lines, same, small, write_network
from tests.support.shard_files import instead, rewrite, six_toy_videos, tensor_bytes

M = "model.config."
TF = "experiment=toy_tf_c3-3"
STUDENT = M + "student_ckpt="
Told = Callable[[int], str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture) -> Told:
    """`told(code)` after a launch: the one line on standard error, which must be there for exit
    code `code`.
    """

    def read(code: int) -> str:
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert code in (1, 2) and len(errors) == 1
        return errors[0]

    return read


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tmp_path / "job"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["net=null"], "net is chosen by name: net=tiny"),
        (["experiment=null"], "experiment is chosen by name"),
        (["checkpoint.load_path=/nowhere/iter_000000001"], "cannot start"),
        (["+x=1"], "unknown key 'x'"),
    ],
)
def test_refused_launches_leave_no_folder(job: Path, told: Told, words: list[str], sentence: str) -> None:
    assert launch(TF, *small(job), *words) == 2
    assert sentence in told(2)
    assert not job.exists()


def test_ode_pairs_are_missing_from_the_toy_world(job: Path, capsys: pytest.CaptureFixture) -> None:
    assert launch("experiment=toy_tf_kd_c3-3", "data=toy", *small(job)[1:], M + "tokenizer.name=toy", M + "text_encoder_class=toy") == 2
    assert "dataloader_train.kind=toy has no ODE trajectories" in capsys.readouterr().err
    assert not job.exists()


def missing_key(folder: Path) -> Path:
    path = write_network(folder / "missing.safetensors")
    state = load_file(path)
    del state["net.blocks.0.self_attn.q.weight"]
    save_file(state, path)
    return path


def wider(folder: Path) -> Path:
    return write_network(folder / "wider.safetensors", dim=64)


def truncated(folder: Path, suffix: str) -> Path:
    whole, path = write_network(folder / "whole.safetensors"), folder / f"cut{suffix}"
    if suffix == ".pt":
        torch.save(load_file(whole), whole := folder / "whole.pt")
    path.write_bytes(whole.read_bytes()[:9000])
    return path


def noise(folder: Path) -> Path:
    path = folder / "noise.pt"
    path.write_bytes(os.urandom(4096))
    return path


def stored(folder: Path, value: object) -> Path:
    path = folder / "value.pt"
    torch.save(value, path)
    return path


FILES = {
    "missing key": (missing_key, ("missing 1 key", "blocks.0.self_attn.q.weight", "model.config.net = tiny, 1 layers of width 32")),
    "another network": (
        wider,
        ("wider.safetensors", "model.config.net = tiny", "patch_embedding.weight has shape (64, 16), expected (32, 16)"),
    ),
    "truncated .pt": (lambda folder: truncated(folder, ".pt"), ("cut.pt cannot be read", "damaged")),
    "truncated .safetensors": (lambda folder: truncated(folder, ".safetensors"), ("cut.safetensors cannot be read", "damaged")),
    "noise": (noise, ("noise.pt cannot be read", "damaged, truncated or not a torch pickle")),
    "not a network": (lambda folder: stored(folder, {"epoch": 3}), ("value.pt", "entries are not tensors: epoch")),
    "not a mapping": (lambda folder: stored(folder, [1, 2]), ("value.pt", "holds a list, not a state dict")),
    "a folder of something else": (lambda folder: folder, ("is not a DCP checkpoint",)),
}


@pytest.mark.parametrize("name", FILES)
def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path, job: Path, told: Told, name: str) -> None:
    make, sentences = FILES[name]
    path = make(tmp_path)
    assert launch(TF, *small(job), f"{STUDENT}{path}") == 1
    told_once = told(1)
    assert all(sentence in told_once for sentence in (str(path), *sentences)), told_once
    assert not (job / "checkpoints").exists()


def test_a_checkpoint_folder_of_another_network_names_both(tmp_path: Path, job: Path, told: Told) -> None:
    first = tmp_path / "first"
    assert launch(TF, *small(first, iterations=1)) == 0
    assert launch(TF, *small(job), f"{STUDENT}{first}", M + "net.dim=64") == 1
    assert "which holds tiny of 1 layers of width 32 (for model.config.net = tiny, 1 layers of width 64)" in told(1)


@pytest.mark.slow
def test_a_job_of_another_network_stays_as_it_was(job: Path, told: Told) -> None:
    """The same folder with another network: checkpoint, numbers and record of the first run
    survive.
    """
    assert launch(TF, *small(job, iterations=1)) == 0
    state, numbers, record = everything(job), lines(job), (job / "config.yaml").read_text()
    assert launch(TF, *small(job), M + "net.ffn_dim=64") == 1
    assert "iter_000000001 holds network 'tiny', this run has 'tiny' (ffn_dim: 48 there, 64 here)" in told(1)
    assert same(everything(job), state) and lines(job) == numbers and (job / "config.yaml").read_text() == record
    assert launch(TF, *small(job, iterations=2)) == 0
    assert [line["step"] for line in lines(job)] == [1, 2]


def test_nan_in_weights_stops_before_the_update(tmp_path: Path, job: Path, told: Told) -> None:
    path = write_network(tmp_path / "start.safetensors")
    state = load_file(path)
    state["net.blocks.0.ffn.0.weight"][3, 3] = float("nan")
    save_file(state, path)
    assert launch(TF, *small(job), f"{STUDENT}{path}") == 1
    message = told(1)
    assert "student update 0 (iteration 0) is not finite: loss of term tf" in message
    assert "first non-finite output from student.blocks.0.ffn.0" in message and "weights were left as they were" in message
    assert not (job / "checkpoints").exists() and not lines(job)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six_toy_videos(tmp_path_factory.mktemp("shards") / "toy")


def from_shards(folder: Path) -> list[str]:
    """Words that read them."""
    toy = [f"net.{key}=24" for key in ("in_dim", "out_dim")] + [
        "net.text_len=8",
        "state_ch=24",
        "tokenizer.name=toy",
        "text_encoder_class=toy",
    ]
    return ["data=latents", f"dataloader_train.tar_path_pattern={folder}/*.tar", *(M + word for word in toy)]


def test_shards_train(shards: Path, job: Path) -> None:
    assert launch(TF, *small(job), *from_shards(shards)) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([M + "latent_hw=[8,8]"], "has latent frames of 4 x 4, the run is set to 8 x 8; change model.config.latent_hw"),
        ([M + "state_t=9"], "has 6 latent frames, fewer than state_t=9; change model.config.state_t"),
        ([M + "net.text_dim=16"], "has shape [8, 8], expected [at most 8, 16] (the network's text_len, text_dim)"),
        ([M + "net.text_len=4"], "has shape [8, 8], expected [at most 4, 8] (the network's text_len, text_dim)"),
        (
            ["dataloader_train.batch_size=7"],
            "6 samples do not fill one global batch of 7 x 1 data ranks; lower dataloader_train.batch_size",
        ),
        (["method=ode_kd", M + "training_type=tf_kd"], "tf_kd needs trajectories of 5 states"),
    ],
)
def test_shards_that_contradict_the_run(shards: Path, job: Path, told: Told, words: list[str], sentence: str) -> None:
    assert launch(TF, *small(job), *from_shards(shards), *words) == 1
    assert sentence in told(1)


def test_a_truncated_shard_is_found_before_training(shards: Path, tmp_path: Path, job: Path, told: Told) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(shards, cut)
    second = cut / "shard-000001.tar"
    second.write_bytes(second.read_bytes()[:-9000])
    assert launch(TF, *small(job), *from_shards(cut)) == 1
    assert f"shard {second} is not a whole uncompressed tar" in told(1)
    assert not (job / "metrics.jsonl").exists()


def test_nan_in_data_stops_the_run_and_the_last_checkpoint_continues(shards: Path, tmp_path: Path, job: Path, told: Told) -> None:
    """The epoch meets the bad sample after some good ones; with the data mended the same command
    goes on.
    """
    spoilt = tmp_path / "spoilt"
    shutil.copytree(shards, spoilt)
    words = [TF, *small(job, iterations=6), *from_shards(spoilt), "checkpoint.save_iter=1"]

    def with_nan(data: bytes) -> bytes:
        latents = torch.load(io.BytesIO(data))
        latents[0, 0, 0, 0] = float("nan")
        return tensor_bytes(latents)

    rewrite(spoilt / "shard-000000.tar", instead("000000001.latent.pt", with_nan))
    assert launch(*words) == 1
    assert "shard-000000.tar: member 000000001.latent.pt holds NaN or infinite values" in told(1)
    done = lines(job)[-1]["step"]
    assert 0 < done < 6 and int((job / "checkpoints/latest_checkpoint.txt").read_text().removeprefix("iter_")) == done
    shutil.copytree(shards, spoilt, dirs_exist_ok=True)
    whole = tmp_path / "whole"
    assert launch(TF, *small(whole, iterations=6), *from_shards(shards)) == 0
    assert launch(*words) == 1
    assert "set checkpoint.accept_changed_data=True where samples were mended" in told(1)
    assert launch(*words, "checkpoint.accept_changed_data=True") == 0
    assert lines(job) == lines(whole) and same(everything(job), everything(whole))


def test_unwritable_output_folder(tmp_path: Path, told: Told) -> None:
    """Below a regular file: not even root can make a folder there."""
    (tmp_path / "file").write_text("")
    assert launch(TF, *small(tmp_path / "file" / "job")) == 1
    message = told(1)
    assert f"cannot write to the job folder {tmp_path}/file/job: {tmp_path}/file is no folder" in message
    assert "set job.output_root or IMAGINAIRE_OUTPUT_ROOT" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("800k")`: a file system of that size; skips where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("this machine does not allow mounting a small file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_full_disk_keeps_the_checkpoint_before(small_disk: Callable[[str], Path], told: Told) -> None:
    job = small_disk("800k") / "job"
    assert launch(TF, *small(job), "checkpoint.save_iter=1") == 1
    message = told(1)
    assert "No space left on device: checkpoint not written" in message and ".writing_iter_000000002" in message
    assert (job / "checkpoints/latest_checkpoint.txt").read_text() == "iter_000000001\n"
    assert len(everything(job)) > 100


@pytest.mark.parametrize(
    ("size", "iterations", "sentence"), [("4k", 3, "cannot write to the job folder"), ("64k", 10_000, "metrics.jsonl")]
)
def test_a_disk_too_small_for_the_log(small_disk, told: Told, size: str, iterations: int, sentence: str) -> None:
    job = small_disk(size) / "job"
    assert launch(TF, *small(job, iterations=iterations)) == 1
    message = told(1)
    assert "No space left on device" in message and sentence in message
