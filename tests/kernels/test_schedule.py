"""The plan of key tiles: every visible key exactly once, interior tiles really interior, long tiles
first; tile sizes fit the card.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.flash_jvp.schedule import EDGE, KIND_COST, PLAIN, TANGENT, make_plan, tile_pieces
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing

MASKS = [
    Full(37, 61),
    Full(32, 64),
    Full(1, 1),
    BlockCausal(BlockPattern(1, 2), 7, 5),
    BlockCausal(BlockPattern(1, 1), 6, 9, q_block_offset=3, window=2, sinks=1),
    TeacherForcing(BlockPattern(2, 1), 5, 7),
    TeacherForcing(BlockPattern(1, 1), 5, 7, queries="noisy", window=2, sinks=1),
    TeacherForcing(BlockPattern(1, 2), 5, 7, queries="noisy", window=1),
]
BLOCKS = [(16, 16), (8, 4), (32, 8)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_pieces_cover_the_union_once_and_interiors_are_common(mask):
    truth = mask.dense()
    for (block_m, block_n), start in itertools.product(BLOCKS, (0, 3, mask.kv_len // 2, mask.kv_len)):
        planned = tile_pieces(mask, block_m=block_m, block_n=block_n, tangent_start=start)
        assert sorted(q_start for q_start, _ in planned) == list(range(0, mask.q_len, block_m))
        for q_start, pieces in planned:
            rows = truth[q_start : q_start + block_m]
            visits = torch.zeros(mask.kv_len, dtype=torch.int32)
            for piece in pieces:
                stop = min(piece.start + piece.count * block_n, piece.stop)
                visits[piece.start : stop] += 1
                assert_kind(piece, rows, start=start, block_n=block_n)
            assert torch.equal(visits, rows.any(dim=0).int()), "each visible key once, others never"


def assert_kind(piece, rows: torch.Tensor, *, start: int, block_n: int) -> None:
    stop = piece.start + piece.count * block_n
    if piece.kind == EDGE:
        inside = rows[:, piece.start : min(stop, piece.stop)]
        assert torch.equal(inside.any(dim=1), inside.all(dim=1)), "a row sees all of a boundary piece or nothing of it"
    else:
        assert stop <= rows.shape[1] and rows[:, piece.start : stop].all(), "an interior tile needs no predicate"
        assert (stop <= start) if piece.kind == PLAIN else (piece.start >= start)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_interior_tiles_are_not_left_to_the_boundary(mask):
    """A run of keys that all rows see, long enough for whole tiles, has at most one boundary tile
    per end and per side of tangent_start.
    """
    for q_start, pieces in tile_pieces(mask, block_m=4, block_n=4, tangent_start=mask.kv_len // 2):
        rows = mask.dense()[q_start : q_start + 4]
        mixed = int((rows.any(dim=0) != rows.all(dim=0)).sum())
        runs = int((rows.any(dim=0).int().diff() != 0).sum()) + 2
        edges = sum(piece.count for piece in pieces if piece.kind == EDGE)
        assert edges <= mixed // 4 + 2 * runs


def test_long_tiles_start_first_and_pieces_are_sorted_by_kind():
    planned = tile_pieces(TeacherForcing(BlockPattern(1, 1), 9, 16, queries="noisy"), block_m=16, block_n=8, tangent_start=9 * 16)
    costs = [sum(KIND_COST[piece.kind] * piece.count for piece in pieces) for _, pieces in planned]
    assert costs == sorted(costs, reverse=True) and costs[0] > 3 * costs[-1]
    assert all([p.kind for p in pieces] == sorted(p.kind for p in pieces) for _, pieces in planned)


def test_device_tables_say_the_same_as_the_integers():
    mask = TeacherForcing(BlockPattern(1, 1), 5, 7, queries="noisy", window=2, sinks=1)
    plan = make_plan(mask, block_m=8, block_n=4, tangent_start=35, device=torch.device("cpu"))
    planned = tile_pieces(mask, block_m=8, block_n=4, tangent_start=35)
    assert plan.num_tiles == len(planned) == 5 and plan.tiles.shape == (5, 8) and plan.edge_mode == 2
    for row, (q_start, pieces) in zip(plan.tiles.tolist(), planned, strict=True):
        assert row[0] == q_start
        for kind in (PLAIN, TANGENT, EDGE):
            found = plan.pieces[row[1 + kind] : row[2 + kind], :3].tolist()
            assert found == [[p.start, p.count, p.stop] for p in pieces if p.kind == kind]
    dense = torch.zeros(mask.q_len, mask.kv_len, dtype=torch.bool)
    for query, bounds in enumerate(plan.rows.tolist()):
        for low, high in zip(bounds[::2], bounds[1::2], strict=True):
            dense[query, low:high] = True
    assert torch.equal(dense, mask.dense())


@pytest.mark.parametrize(("mask", "classes", "edge_mode"), [(Full(16, 32), 1 << TANGENT, 0), (Full(16, 33), 1 << TANGENT | 1 << EDGE, 1)])
def test_kinds_that_do_not_occur_are_not_compiled(mask, classes, edge_mode):
    plan = make_plan(mask, block_m=16, block_n=16, tangent_start=0, device=torch.device("cpu"))
    assert (plan.classes, plan.edge_mode) == (classes, edge_mode)


def test_plans_are_cached_by_mask():
    options = {"block_m": 16, "block_n": 16, "tangent_start": 0, "device": torch.device("cpu")}
    assert make_plan(Full(20, 30), **options) is make_plan(Full(20, 30), **options)


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_portable_tiles_fit_shared_memory(shared_kib, element_size, width):
    pytest.importorskip("triton")
    from rcm.kernels.flash_jvp.launch import portable_tiles

    for tangents in (0, 3):
        tiles = portable_tiles(d_qk=width, d_v=width, element_size=element_size, num_tangents=tangents, shared_bytes=shared_kib * 1024)
        copies = 2 if tangents else 1
        used = element_size * copies * (tiles.block_m * width + tiles.num_stages * tiles.block_n * 2 * width)
        assert used <= shared_kib * 1024 and tiles.block_m >= 16 and tiles.block_n >= 16


def test_a_card_too_small_is_refused():
    pytest.importorskip("triton")
    from rcm.kernels.flash_jvp.launch import portable_tiles

    with pytest.raises(ValueError, match="96 KiB of shared memory"):
        portable_tiles(d_qk=256, d_v=256, element_size=4, num_tangents=3, shared_bytes=48 * 1024)
