"""Streaming: decoded chunks against one-shot decoding, prefixes, and the latency report."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.nets.condition import Condition
from rcm.nets.denoiser import Denoiser
from rcm.pipelines.stream_spec import StreamedChunk, StreamReport, count_prefix_blocks
from rcm.pipelines.streaming import stream_latents, stream_video
from tests.support.tiny_checkpoint import CODEC, LATENT_SHAPE, PROMPT, STUDENT, TEACHER, TEXT, world_net

SHAPE = (2, *LATENT_SHAPE)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(world_net(), Precision.preset("fp32")).eval_params()


@pytest.fixture(scope="module")
def cond() -> Condition:
    return Condition(TEXT.encode([PROMPT, "a blue square moving up"]))


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("recipe", [STUDENT, TEACHER, replace(STUDENT, noisy_context=True)], ids=["student", "teacher", "noisy"])
def test_streamed_chunks_are_the_one_shot_decode_of_the_one_shot_latents(denoiser, cond, recipe):
    chunks = list(stream_video(denoiser, CODEC, cond, recipe, shape=SHAPE, generator=noise()))
    whole = torch.cat([x for _, x in stream_latents(denoiser, cond, recipe, shape=SHAPE, generator=noise())], dim=2)
    assert [c.block for c in chunks] == list(range(recipe.blocks.num_blocks(SHAPE[2])))
    assert torch.equal(torch.cat([c.latents for c in chunks], dim=2), whole)
    assert torch.equal(torch.cat([c.frames for c in chunks], dim=2), CODEC.decode(whole))
    assert whole.std() > 0.1


def test_a_chunk_is_there_before_the_next_is_computed(denoiser, cond, request):
    calls = []
    request.addfinalizer(denoiser.net.register_forward_pre_hook(lambda *_: calls.append(1)).remove)
    stream = stream_video(denoiser, CODEC, cond, STUDENT, shape=SHAPE, generator=noise())
    assert not calls
    next(stream)
    assert len(calls) == 3
    next(stream)
    assert len(calls) == 3 + 1 + 2, "the context pass belongs to the next chunk"
    assert list(stream) == []
    assert len(calls) == 6, "the last chunk has no context pass"


def test_later_chunks_depend_on_the_prefix_and_the_prefix_is_kept(denoiser, cond):
    given = torch.randn(2, 24, 3, 4, 4, generator=torch.Generator().manual_seed(8))
    options = {"shape": SHAPE, "generator": noise()}
    first, second = stream_latents(denoiser, cond, STUDENT, prefix=given, **options)
    assert torch.equal(first[1], given)
    again = list(stream_latents(denoiser, cond, STUDENT, prefix=given + 0.1, shape=SHAPE, generator=noise()))
    assert (again[1][1] - second[1]).abs().max() > 1e-4


def test_a_prefix_ends_on_a_block_and_leaves_something_to_do():
    recipe = replace(STUDENT, pattern="c1-4")
    assert [count_prefix_blocks(recipe, k, 9) for k in (0, 1, 5)] == [0, 1, 2]
    for frames in (2, 9):
        with pytest.raises(ConfigError, match=r"give 1, 5 latent frames"):
            count_prefix_blocks(recipe, frames, 9)
    with pytest.raises(ConfigError, match="make the video longer"):
        count_prefix_blocks(recipe, 1, 1)


def test_report_separates_the_first_chunk_from_the_later_ones():
    report = StreamReport()
    for block, seconds in enumerate((2.0, 2.5, 3.5)):
        report.add(StreamedChunk(block, torch.zeros(1, 24, 3, 4, 4), torch.zeros(1, 3, 7, 8, 8), seconds))
    assert (report.first_chunk, report.later_chunks, report.fps) == (2.0, 0.75, 21 / 3.5)
