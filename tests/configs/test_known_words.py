"""A toy checkpoint says which words its captions had, whatever they were read from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.configs.build import description
from rcm.configs.build_data import build_loader, known_words
from rcm.configs.compose import compose_run
from rcm.data.shard_writer import ShardSample, write_shard
from rcm.parallel.mesh import ParallelDims

CAPTIONS = ["a dog runs", "a cat sleeps"]


def _shards(folder: Path) -> str:
    samples = [ShardSample(torch.zeros(24, 9, 4, 4), torch.zeros(3, 64), CAPTIONS[i % 2]) for i in range(16)]
    write_shard(folder / "shard-000000.tar", samples, first_key=0)
    return f"dataloader_train.tar_path_pattern={folder}/*.tar"


@pytest.mark.parametrize("kind", ["toy", "toy_shards", "prompts", "fake"])
def test_words_come_from_the_captions(kind: str, tmp_path: Path) -> None:
    data = [f"data={kind}", "dataloader_train.batch_size=2"]
    if kind == "toy_shards":
        data.append(_shards(tmp_path))
    if kind in ("prompts", "fake"):
        sizes = {"state_ch": 24, "state_t": 9, "latent_hw": "[4,4]", "text_encoder_class": "toy", "tokenizer": "{name: toy}"}
        data += [f"model.config.{key}={value}" for key, value in sizes.items()]
    if kind == "prompts":
        (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
        data.append(f"dataloader_train.tar_path_pattern={tmp_path}/prompts.txt")
    run = compose_run(["experiment=toy_sf_dmd_2step_c3-3", *data], require_inputs=False)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, device_type="cpu")
    words = known_words(run.config.model.config, build_loader(run.config, dims=dims).source)
    expected = {"toy": "square", "toy_shards": "sleeps", "prompts": "sleeps"}
    assert expected[kind] in words if kind in expected else words == ()
    assert description(run, words=words).extra["text"]["words"] == list(words)
