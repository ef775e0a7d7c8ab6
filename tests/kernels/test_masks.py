"""The three faces of a mask agree with each other and with an oracle written from Causal_rCM.md
section 2.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.masks import BlockCausal, Full, MaskSpec, TeacherForcing
from tests.support import mask_oracle

# first, chunk, frames
PATTERNS = [(1, 1, 5), (3, 3, 9), (1, 4, 9), (2, 3, 8), (4, 1, 7), (5, 3, 5)]
# window, sinks
REACH = [(None, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 3), (3, 2), (99, 0), (None, 2)]
FRAME_TOKENS = [1, 3, 7]


def _case(sizes: tuple[int, int, int, int], **rest) -> dict:
    return {**dict(zip(("first", "chunk", "num_frames", "tokens_per_frame"), sizes, strict=True)), **rest}


def causal_cases():
    for (first, chunk, frames), (window, sinks), tokens in itertools.product(PATTERNS, REACH, FRAME_TOKENS):
        blocks = 1 + (frames - first) // chunk
        for offset in {0, blocks // 2, blocks - 1}:
            yield _case((first, chunk, frames, tokens), window=window, sinks=sinks, q_block_offset=offset)


def teacher_cases():
    for (first, chunk, frames), (window, sinks), tokens, queries in itertools.product(PATTERNS, REACH, FRAME_TOKENS, ["both", "noisy"]):
        yield _case((first, chunk, frames, tokens), window=window, sinks=sinks, queries=queries)


def build(kind: type, case: dict) -> MaskSpec:
    rest = {key: value for key, value in case.items() if key not in ("first", "chunk")}
    return kind(BlockPattern(case["first"], case["chunk"]), **rest)


def assert_faces_equal(mask: MaskSpec, truth: torch.Tensor) -> None:
    assert isinstance(mask, MaskSpec)
    assert (mask.q_len, mask.kv_len) == tuple(truth.shape)
    assert torch.equal(mask.dense(), truth), mask
    segments = mask.row_segments()
    assert torch.equal(mask_oracle.from_intervals(segments, q_len=mask.q_len, kv_len=mask.kv_len), truth), mask
    assert_segments_well_formed(mask, segments)
    assert mask.is_full == bool(truth.all())
    for block_m in (1, 4, 6, 64):
        assert_tiles_bound_rows(mask, truth, block_m)


def assert_segments_well_formed(mask: MaskSpec, segments) -> None:
    assert [s.q_start for s in segments] == [0, *[s.q_stop for s in segments[:-1]]] and segments[-1].q_stop == mask.q_len
    assert all(a.intervals != b.intervals for a, b in itertools.pairwise(segments)), "runs must be maximal"
    for segment in segments:
        flat = [edge for interval in segment.intervals for edge in interval]
        assert 1 <= len(segment.intervals) <= 3 and flat == sorted(set(flat)), "intervals must be sorted, disjoint and not touch"


def assert_tiles_bound_rows(mask: MaskSpec, truth: torch.Tensor, block_m: int) -> None:
    tiles = mask.kv_intervals(block_m)
    assert len(tiles) == -(-mask.q_len // block_m)
    for index, tile in enumerate(tiles):
        assert (tile.q_start, tile.q_stop) == (index * block_m, min((index + 1) * block_m, mask.q_len))
        rows = truth[tile.q_start : tile.q_stop]
        painted = mask_oracle.from_intervals([(0, 1, tile.union), (1, 2, tile.common)], q_len=2, kv_len=mask.kv_len)
        assert torch.equal(painted[0], rows.any(dim=0)) and torch.equal(painted[1], rows.all(dim=0)), (mask, tile)
        assert tile.straddles == bool((rows.any(dim=0) != rows.all(dim=0)).any())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_block_causal_faces_match_the_oracle(pattern):
    for case in causal_cases():
        if (case["first"], case["chunk"], case["num_frames"]) == pattern:
            assert_faces_equal(build(BlockCausal, case), mask_oracle.block_causal(**case))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_teacher_forcing_faces_match_the_oracle(pattern):
    for case in teacher_cases():
        if (case["first"], case["chunk"], case["num_frames"]) == pattern:
            assert_faces_equal(build(TeacherForcing, case), mask_oracle.teacher_forcing(**case))


@pytest.mark.parametrize("sizes", [(1, 1), (5, 9), (7, 3)])
def test_full_faces(sizes):
    assert_faces_equal(Full(*sizes), torch.ones(*sizes, dtype=torch.bool))


def block_view(mask: MaskSpec, blocks: list[int]) -> dict:
    """(row label, column label) -> sees, at one token per frame and labels c0.., n0.."""
    labels = [f"c{b}" for b in blocks] + [f"n{b}" for b in blocks]
    rows = labels if mask.q_len == len(labels) else labels[len(blocks) :]
    dense = mask.dense()
    return {(row, col): bool(dense[i, j]) for i, row in enumerate(rows) for j, col in enumerate(labels)}


@pytest.mark.parametrize("queries", ["both", "noisy"])
def test_teacher_forcing_in_sentences(queries):
    mask = TeacherForcing(BlockPattern(1, 2), 7, 1, queries=queries)
    blocks = [0, 1, 1, 2, 2, 3, 3]
    sees = block_view(mask, blocks)
    for i, j in itertools.product(blocks, blocks):
        assert sees[f"n{i}", f"c{j}"] == (j < i), "noisy query block i sees clean block j iff j < i"
        assert sees[f"n{i}", f"n{j}"] == (j == i), "noisy query block i sees noisy block i only"
        if queries == "both":
            assert sees[f"c{i}", f"c{j}"] == (j <= i), "clean query block i sees clean block j iff j <= i"
            assert not sees[f"c{i}", f"n{j}"], "clean queries never see noisy keys"


def test_window_one_keeps_the_own_block_and_the_sinks():
    sees = block_view(TeacherForcing(BlockPattern(1, 1), 4, 1, window=1, sinks=1), [0, 1, 2, 3])
    for i, j in itertools.product(range(4), range(4)):
        assert sees[f"n{i}", f"c{j}"] == (j == 0 and i > 0), "with window 1 only the sink is left of the clean past"
        assert sees[f"c{i}", f"c{j}"] == (j in (0, i) and j <= i)


def test_window_counts_the_own_block():
    dense = BlockCausal(BlockPattern(2, 3), 11, 1, window=2).dense()
    assert dense[8].tolist() == [False] * 5 + [True] * 6, "block 3 with window 2 sees blocks 2 and 3"


def test_single_chunk_over_its_cache_is_full():
    pattern = BlockPattern(1, 4)
    assert BlockCausal(pattern, 9, 6, q_block_offset=2).is_full
    assert not BlockCausal(pattern, 9, 6, q_block_offset=1).is_full
    assert not BlockCausal(pattern, 9, 6, q_block_offset=2, window=1).is_full
    assert BlockCausal(pattern, 9, 6, q_block_offset=2, window=2, sinks=1).is_full
    assert BlockCausal(pattern, 9, 6, q_block_offset=1, num_q_blocks=2).q_len == 48


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockCausal(BlockPattern(1, 4), 9, 6, q_block_offset=3), "q_block_offset"),
        (lambda: BlockCausal(BlockPattern(1, 4), 9, 6, q_block_offset=1, num_q_blocks=1), "num_q_blocks"),
        (lambda: BlockCausal(BlockPattern(1, 4), 8, 6), "8"),
        (lambda: BlockCausal(BlockPattern(1, 1), 3, 2, window=0), "window"),
        (lambda: TeacherForcing(BlockPattern(1, 1), 3, 2, sinks=-1), "sinks"),
        (lambda: TeacherForcing(BlockPattern(1, 1), 3, 0), "tokens_per_frame"),
        (lambda: TeacherForcing(BlockPattern(1, 1), 3, 2, queries="clean"), "queries"),
        (lambda: Full(0, 3), "q_len"),
    ],
)
def test_invalid_masks_raise_and_name_the_knob(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_tile_size_must_be_positive():
    with pytest.raises(ValueError, match="block_m"):
        Full(3, 3).kv_intervals(0)


def test_masks_are_keys():
    pattern = BlockPattern(1, 2)
    assert {TeacherForcing(pattern, 3, 2): 1}[TeacherForcing(BlockPattern(1, 2), 3, 2)] == 1
    assert TeacherForcing(pattern, 3, 2) != TeacherForcing(pattern, 3, 2, window=1)


def test_predicate_is_traceable_by_flex_attention():
    """FlexAttention calls the predicate with scalar tensors under vmap."""
    mask = TeacherForcing(BlockPattern(1, 2), 5, 3, window=2, sinks=1)
    q_idx, kv_idx = torch.arange(mask.q_len), torch.arange(mask.kv_len)
    mapped = torch.vmap(torch.vmap(mask.allowed, in_dims=(None, 0)), in_dims=(0, None))(q_idx, kv_idx)
    assert torch.equal(mapped, mask.dense())
