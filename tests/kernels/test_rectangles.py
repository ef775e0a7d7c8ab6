"""Dense rectangles cover every visible pair exactly once, in few calls; sums of partial results
lose and double nothing.
"""

from __future__ import annotations

import random

import pytest
import torch

from rcm.diffusion.blocks import BlockPattern
from rcm.kernels.masked_attention import rectangles
from rcm.kernels.masked_attention.backward import Teeth, plan_sum
from rcm.kernels.masked_attention.rectangles import Comb, combs, cost
from rcm.kernels.masks import BlockCausal, Full, MaskSpec, Segment, TeacherForcing
from tests.support import mutants
from tests.support.in_interpreter import in_interpreter


def random_mask(seed: int) -> MaskSpec:
    """Any kind of mask with 1 to 11 blocks."""
    draw = random.Random(seed)
    pattern, blocks = BlockPattern(draw.randint(1, 4), draw.randint(1, 3)), draw.randint(1, 11)
    frames, tokens = pattern.first + (blocks - 1) * pattern.chunk, draw.randint(1, 3)
    reach = {"window": draw.choice([None, None, 1, 2, 3, 5]), "sinks": draw.choice([0, 0, 1, 2])}
    kind = draw.choice(["causal", "offset", "both", "noisy", "full"])
    if kind == "full":
        return Full(draw.randint(1, 9), draw.randint(1, 9))
    if kind in ("causal", "offset"):
        return BlockCausal(pattern, frames, tokens, q_block_offset=draw.randrange(blocks) if kind == "offset" else 0, **reach)
    return TeacherForcing(pattern, frames, tokens, queries=kind, **reach)


def times_seen(calls: tuple[Comb, ...], mask: MaskSpec) -> torch.Tensor:
    """How often each (query, key) pair is in a rectangle."""
    seen = torch.zeros(mask.q_len, mask.kv_len, dtype=torch.int32)
    for call in calls:
        for r in call.rectangles():
            seen[r.q_start : r.q_stop, r.k_start : r.k_stop] += 1
    return seen


def uncovered(module, seeds: range) -> list[int]:
    """Seeds of masks whose visible pairs `module.combs` does not cover exactly once."""
    masks = {seed: random_mask(seed) for seed in seeds}
    return [seed for seed, mask in masks.items() if not torch.equal(times_seen(module.combs(mask), mask), mask.dense().int())]


def test_every_visible_pair_exactly_once():
    assert not uncovered(rectangles, range(300))


def test_every_cover_that_is_compared_is_exact(monkeypatch):
    """Not only the cheapest: each candidate is asked for in turn."""
    for choice in range(8):
        monkeypatch.setattr(rectangles, "min", lambda covers, key, choice=choice: list(covers)[choice], raising=False)
        combs.cache_clear()
        assert not uncovered(rectangles, range(60))
    combs.cache_clear()


@pytest.mark.parametrize("seed", range(40))
def test_rectangles_of_one_call_share_no_row_and_no_column(seed):
    for call in combs(random_mask(seed)):
        assert call.q_step >= call.q_len and call.k_step >= call.k_len


@pytest.mark.parametrize(("name", "most_calls"), [("c3-3", 9), ("c1-1", 14), ("c1-4", 10)])
def test_training_shapes_take_few_large_calls(name, most_calls):
    """21 latent frames at 480p: the cover costs little more than its pairs, far less than one call
    per segment.
    """
    mask = TeacherForcing(BlockPattern.parse(name), 21, 1560)
    tiles = sum((s.q_stop - s.q_start) * (b - a) for s in mask.row_segments() for a, b in s.intervals) / rectangles.TILE**2
    per_segment = tuple(Comb(s.q_start, s.q_stop - s.q_start, 1, a, b - a, 1, 1) for s in mask.row_segments() for a, b in s.intervals)
    assert len(combs(mask)) <= most_calls
    assert tiles <= cost(combs(mask)) < 1.19 * tiles
    assert cost(combs(mask)) < cost(per_segment)


def test_keys_that_no_query_sees_are_in_no_rectangle():
    class Gappy(Full):
        def row_segments(self):
            return (Segment(0, 2, ((1, 3), (5, 6))), Segment(2, 4, ((5, 6),)))

    covered = {(r.q_start, r.q_stop, r.k_start, r.k_stop) for call in combs(Gappy(4, 8)) for r in call.rectangles()}
    pairs = {(q, k) for a, b, c, d in covered for q in range(a, b) for k in range(c, d)}
    assert pairs == {(q, k) for q in range(4) for k in range(8) if k == 5 or (q < 2 and k in (1, 2))}


@pytest.mark.parametrize("seed", range(60))
def test_partial_results_add_up(seed):
    """Random ranges, also overlapping, partial and with gaps, against plain addition; tokens
    outside the sum are written at most once.
    """
    draw, length = random.Random(seed), 24
    calls = []
    for _ in range(draw.randint(1, 6)):
        size = draw.randint(1, 5)
        count = draw.randint(1, length // size // 2)
        step = draw.randint(size, (length - size) // (count - 1) if count > 1 else length)
        calls.append(Teeth(draw.randint(0, length - size - (count - 1) * step), size, step, count))
    plan = plan_sum(tuple(calls), length)
    expected, got = torch.zeros(length), torch.zeros(length) if plan.clear else torch.full((length,), float("nan"))
    for teeth, moves in zip(calls, plan.moves, strict=True):
        values = torch.randn(teeth.count, teeth.length, generator=torch.Generator().manual_seed(seed))
        teeth.cut(expected).add_(values)
        assert [i for move in moves for i in range(move.first, move.last)] == list(range(teeth.count))
        for move in moves:
            part = teeth.part(move.first, move.last)
            inside = [plan.start <= part.start + i * part.step < plan.stop for i in range(part.count)]
            assert all(inside) if move.wide else not any(inside)
            target = part.cut(got)
            if move.add or (plan.clear and move.wide):
                target.add_(values[move.first : move.last])
            else:
                target.copy_(values[move.first : move.last])
    torch.testing.assert_close(got, expected)


def test_views_of_a_comb_are_its_ranges():
    x = torch.arange(40.0).reshape(20, 2)
    cut = Teeth(start=3, length=2, step=5, count=3).cut(x)
    assert torch.equal(cut, torch.stack([x[3:5], x[8:10], x[13:15]]))
    assert torch.equal(Teeth(3, 2, 5, 3).cut(x.T, dim=1), torch.stack([x.T[:, 3:5], x.T[:, 8:10], x.T[:, 13:15]]))
    assert cut.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


MUTANTS = {
    "a full part is dropped": (
        "            found.append(cells.rectangle(top, bottom, left, right))\n            return",
        "            return",
    ),
    "one visible cell counts as full": ("if seen == (bottom - top) * (right - left):", "if seen >= 1:"),
    "row too short": ("self.rows[bottom - 1][1], self.columns[left]", "self.rows[bottom - 1][1] - 1, self.columns[left]"),
    "sequence one too long": ("left = [corner for corner in left if corner not in sequence]", "left = left[1:]"),
    "steps may overlap": ("if q_step < q_len or k_step < k_len:", "if q_step < 0:"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_covers_are_noticed(name, tmp_path):
    old, new = MUTANTS[name]
    broken = mutants.load(rectangles, old=old, new=new, folder=tmp_path)
    if name == "steps may overlap":
        assert any(c.q_step < c.q_len or c.k_step < c.k_len for seed in range(60) for c in broken.combs(random_mask(seed)))
        return
    assert uncovered(broken, range(60))


def test_the_kernel_that_adds_up_in_tritons_interpreter():
    """Against torch in both modes and three pairs of dtypes; broken kernels are noticed."""
    report = in_interpreter("interpreted_deposit")
    assert max(report["cases"].values()) <= 2e-3, "one rounding of half precision"
    assert min(report["mutants"].values()) > 0.05
