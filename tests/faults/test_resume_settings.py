"""What a run may change when it goes on from a checkpoint, and what data it goes on with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rcm.configs import cli, registry_distill
from rcm.configs.compose import compose_run
from rcm.configs.continuity import CHANGEABLE, FREE, continued_settings
from rcm.configs.convert import known_paths
from rcm.configs.schema import TrainConfig
from rcm.data.tar_index import INDEX_SUFFIX
from tests.faults.case import Fault, count, each
from tests.integration.entry import launch, lines, small
from tests.support.shard_files import instead, rewrite, six_toy_videos, tensor_bytes

M = "model.config."
TF = "experiment=toy_tf_c3-3"


def resumed(name: str, refusal: str | None, *words: str) -> Fault:
    """One iteration as usual, a second one with these words; a refusal leaves the job as it was."""

    def argv(folder: Path) -> list[str]:
        assert launch(TF, *small(folder / "job", iterations=1)) == 0
        return [TF, *small(folder / "job", iterations=2), *words]

    def after(folder: Path) -> None:
        assert len(lines(folder / "job")) == (2 if refusal is None else 1)

    return Fault(name, kind="settings of a resumed run", refusal=refusal, main=cli.main, argv=argv, after=after)


CASES = [
    resumed("precision", r"time_precision|model.config.precision: 'float32' there, 'bfloat16' here", "precision=bf16"),
    resumed("pattern", r"first_chunk_t: 3 there, 1 here", M + "first_chunk_t=1", M + "chunk_t=1"),
    resumed("stage", r"training_type: 'tf' there, 'df' here", M + "training_type=df", M + "loss_weighting=gaussian_bell"),
    resumed("seed", r"trainer.seed: 0 there, 1 here", "trainer.seed=1"),
    resumed("order of data", r"shuffle_seed", "dataloader_train.shuffle_seed=1"),
    resumed("number of data", r"num_samples=5", "dataloader_train.num_videos=6"),
    resumed("decay", r"optimizer.weight_decay: 0.0 there, 0.01 here", "optimizer.weight_decay=0.01"),
    resumed("moments", r"optimizer.betas", "optimizer.betas=[0.5,0.9]"),
    resumed("averaging", r"ema.rate", M + "ema.rate=0.2"),
    resumed("times", r"p_G.shift", M + "p_G.shift=2"),
    resumed("scale", r"loss_scale: .* there, 7.0 here", M + "loss_scale=7"),
    resumed("rate", None, "optimizer.lr=1e-5"),
    resumed("warm-up", None, "scheduler.warm_up_steps=7"),
    resumed("clipping", None, M + "grad_clip=True"),
    resumed("threads and names", None, "dataloader_train.num_workers=3", "trainer.logging_iter=1", "job.wandb_project=other"),
]


@each(CASES)
def test_changes(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


def test_a_legitimate_change_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from loguru import logger

    told: list[str] = []
    assert launch(TF, *small(tmp_path / "job", iterations=1)) == 0
    sink = logger.add(lambda line: told.append(str(line)), level="WARNING", format="{message}")
    try:
        assert launch(TF, *small(tmp_path / "job", iterations=2), "optimizer.lr=1e-5", "scheduler.warm_up_steps=7") == 0
    finally:
        logger.remove(sink)
    said = [line for line in told if "other settings" in line]
    assert len(said) == 1 and "optimizer.lr: " in said[0] and "scheduler.warm_up_steps: 1 there, 7 here" in said[0]


def test_a_rollout_may_be_replayed_from_now_on() -> None:
    """What a run that found no memory turns on."""
    registry_distill.register()
    words = ["experiment=toy_sf_dmd_c3-3"], ["experiment=toy_sf_dmd_c3-3", M + "replayed_training=True"]
    plain, replayed = (continued_settings(compose_run(w, require_inputs=False).config) for w in words)
    replayed.require_continues(plain.record(), source="a checkpoint")


def test_the_tables_name_keys() -> None:
    known = known_paths(TrainConfig)
    assert not [key for key in (*CHANGEABLE, *FREE) if key not in known]
    assert not set(CHANGEABLE) & set(FREE)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six_toy_videos(tmp_path_factory.mktemp("shards") / "toy")


def from_shards(pattern: str) -> list[str]:
    net = [f"net.{key}=24" for key in ("in_dim", "out_dim")] + ["net.text_len=8"]
    model = [*net, "state_ch=24", "tokenizer.name=toy", "text_encoder_class=toy"]
    return ["data=latents", f"dataloader_train.tar_path_pattern={pattern}", *(M + word for word in model)]


def other_latent(data: bytes) -> bytes:
    """The same number of bytes, one value changed."""
    latents = torch.load(io.BytesIO(data), weights_only=True)
    latents.view(-1)[5] += 1
    assert len(changed := tensor_bytes(latents)) == len(data)
    return changed


def in_the_second_shard(member: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "shard-000001.tar", instead(member, change))


ONE_VALUE = in_the_second_shard("000000004.latent.pt", other_latent)
ONE_LETTER = in_the_second_shard("000000005.prompt.txt", lambda data: data.replace(b"a", b"o", 1))


def copied(shards: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def changed_data(name: str, refusal: str | None, change: Callable[[Path], None], *words: str) -> Callable[[Path], Fault]:
    """A run that goes on after `change` of its shards' folder."""

    def case(shards: Path) -> Fault:
        def argv(folder: Path) -> list[str]:
            data = copied(shards, folder / "run[1]" / "x{y}")
            assert launch(TF, *small(folder / "job", iterations=1), *from_shards(f"{data}/*.tar")) == 0
            change(data)
            return [TF, *small(folder / "job", iterations=2), *from_shards(f"{data}/*.tar"), *words]

        return Fault(name, kind="data of a resumed run", refusal=refusal, main=cli.main, argv=argv)

    return case


def _without_index(folder: Path) -> None:
    for path in folder.glob(f"*{INDEX_SUFFIX}"):
        path.unlink()


def _swapped(folder: Path) -> None:
    first, second = sorted(folder.glob("*.tar"))
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)


DATA = {
    "the same": changed_data("the same", None, lambda folder: None),
    "without indices": changed_data("without indices", None, _without_index),
    "one value": changed_data("one value", "fingerprint=.*accept_changed", ONE_VALUE),
    "one letter": changed_data("one letter", "fingerprint=.*accept_changed", ONE_LETTER),
    "swapped shards": changed_data("swapped shards", "fingerprint=", _swapped),
    "mended": changed_data("mended", None, ONE_LETTER, "checkpoint.accept_changed_data=True"),
    "fewer": changed_data("fewer", "num_samples=6", lambda f: (f / "shard-000001.tar").unlink()),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, shards: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count(request, "data of a resumed run", "unclear")
    DATA[name](shards).check(tmp_path)
    count(request, "data of a resumed run")


def test_a_foreign_index_is_not_believed(shards: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The second shard's index beside the first."""
    count(request, "data of a resumed run", "unclear")
    data = copied(shards, tmp_path / "data")
    first, second = (data / f"shard-00000{i}.tar{INDEX_SUFFIX}" for i in range(2))
    stored = json.loads(second.read_text())
    first.write_text(json.dumps({**stored, "size": (data / "shard-000000.tar").stat().st_size}))
    assert launch(TF, *small(tmp_path / "job", iterations=1), *from_shards(f"{data}/*.tar")) == 0
    assert launch(TF, *small(tmp_path / "whole", iterations=1), *from_shards(f"{shards}/*.tar")) == 0
    assert lines(tmp_path / "job") == lines(tmp_path / "whole")
    count(request, "data of a resumed run")
