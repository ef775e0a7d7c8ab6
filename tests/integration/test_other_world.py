"""A run goes on with other ranks and another layout: with as many data ranks as before the numbers
are those of the unbroken run but for rounding, whatever shards, copies and shared sequences are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.entry import everything, write_network
from tests.integration.test_gan import GAN
from tests.integration.test_ranks import CONTEXT, M, close, dmd, exit_codes, scm
from tests.support.dist import run_ranks

SHARDS = {count: f"{M}fsdp_shard_size={count}" for count in (1, 2, 4)}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "4 ranks, 2 share a sample, shards of 4": (4, [CONTEXT, SHARDS[4]]),
    "2 ranks, shards of 2": (2, [SHARDS[2]]),
    "4 ranks, 2 share a sample, copies": (4, [CONTEXT, SHARDS[2]]),
    "2 ranks, copies": (2, [SHARDS[1]]),
}
"""Ranks and words of layouts with two data ranks."""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", [scm, dmd])
def test_one_layout_after_another(tmp_path: Path, kind) -> None:
    """An iteration on each, between student and fake score and in the middle of an epoch."""
    start = write_network(tmp_path / "start.safetensors", seed=3)
    more = [*(GAN if kind is dmd else []), "trainer.grad_accum_iter=2", "dataloader_train.num_videos=7"]
    for number, (ranks, layout) in enumerate(LAYOUTS.values(), start=1):
        words = kind(tmp_path / "parts", start, *more, *layout, iterations=number)
        assert run_ranks(ranks, exit_codes, [words], tmp_path=tmp_path) == [[0]] * ranks
    whole = kind(tmp_path / "whole", start, *more, *LAYOUTS["2 ranks, shards of 2"][1], iterations=len(LAYOUTS))
    assert run_ranks(2, exit_codes, [whole], tmp_path=tmp_path) == [[0]] * 2
    close(tmp_path / "parts", tmp_path / "whole", rel=1e-6)
    mine, theirs = everything(tmp_path / "parts"), everything(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"trainer/record"}:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-9)
