from __future__ import annotations

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.data.batch import LatentBatch, PromptBatch


def record(**changes):
    fields = {"latents": torch.zeros(2, 4, 3, 5, 6), "cond": torch.zeros(2, 8, 16), "prompts": ["a", "b"], "keys": ["0", "1"]}
    return LatentBatch(**{**fields, **changes})


def test_a_good_record():
    batch = record(trajectory=torch.zeros(2, 5, 4, 3, 5, 6))
    assert batch.batch_size == 2 and batch.text is batch.cond
    moved = batch.to("meta")
    assert moved.latents.is_meta and moved.cond.is_meta and moved.trajectory.is_meta and moved.prompts == ["a", "b"]
    assert record().to("cpu").trajectory is None
    prompts = PromptBatch(torch.zeros(1, 8, 16), ["x"])
    assert prompts.batch_size == 1 and prompts.to("meta").text.is_meta


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"latents": torch.zeros(2, 4, 3, 5)}, "latents must be"),
        ({"latents": torch.zeros(3, 4, 3, 5, 6)}, "3 latents came with 2 prompts"),
        ({"cond": torch.zeros(2, 16)}, "text embeddings must be"),
        ({"cond": torch.zeros(3, 8, 16)}, "text embeddings must be"),
        ({"keys": ["0"]}, "1 keys"),
        ({"trajectory": torch.zeros(2, 5, 4, 3, 5, 7)}, "trajectory must be"),
        ({"trajectory": torch.zeros(2, 4, 3, 5, 6)}, "trajectory must be"),
    ],
)
def test_contradictions_are_refused(changes, word):
    with pytest.raises(ConfigError, match=word):
        record(**changes)


def test_prompt_batch_counts():
    with pytest.raises(ConfigError, match="one row of B per prompt"):
        PromptBatch(torch.zeros(2, 8, 16), ["x"])
