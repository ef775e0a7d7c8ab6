"""Broken copies of masks and reference: each must be noticed by the comparison that the tests
beside this file make.
"""

from __future__ import annotations

import pytest
import torch

from rcm.diffusion.blocks import BlockPattern
from rcm.kernels import masks
from rcm.kernels.flash_jvp import reference
from rcm.kernels.flash_jvp.validation import check_problem
from tests.support import attention_oracle, mask_oracle, mutants

MASK_MUTANTS = {
    "causal: <= to <": ("(kv_block <= q_block) & self", "(kv_block < q_block) & self"),
    "teacher: strict < to <=": ("(kv_block < q_block) & self", "(kv_block <= q_block) & self"),
    "teacher: clean sees noisy": ("(strictly_before & ~kv_noisy)", "strictly_before"),
    "teacher: noisy sees own clean block": ("(q_noisy == kv_noisy) & (q_block", "(q_noisy | ~kv_noisy) & (q_block"),
    "window one too wide": ("kv_block > q_block - self.window", "kv_block >= q_block - self.window"),
    "sinks one too many": ("kv_block < self.sinks", "kv_block <= self.sinks"),
    "first block ignored": ("// self.pattern.chunk + 1).clamp(min=0)", "// self.pattern.chunk + 1)"),
    "offset forgotten": ("self._block_of(q_idx + self._q_token_offset)", "self._block_of(q_idx)"),
    "segments: window off by one": ("block - self.window + 1)", "block - self.window)"),
    "segments: sink blocks twice": ("prefix[: self.sinks] +", "[] +"),
    "segments: noisy prefix includes own": ("[*mask._prefix(bounds, i, i), (half", "[*mask._prefix(bounds, i, i + 1), (half"),
    "tiles: common from the first run only": ("_intersection(common, segments[last].intervals)", "common"),
    "tiles: union from the first run only": ("_union([*union, *segments[last].intervals])", "union"),
}
REFERENCE_MUTANTS = {
    "normaliser term dropped": ("-h.sum(dim=-1, keepdim=True) * o]", "0 * o]"),
    "normaliser sign": ("-h.sum(dim=-1, keepdim=True) * o]", "h.sum(dim=-1, keepdim=True) * o]"),
    "H without P": ("h = p * (scale * sum(score_terms))", "h = scale * sum(score_terms)"),
    "scale missing in S_dot": ("p * (scale * sum(score_terms))", "p * sum(score_terms)"),
    "q_dot term forgotten": ("((q_dot, k), (q, k_dot))", "((q, k_dot),)"),
    "k_dot term forgotten": ("((q_dot, k), (q, k_dot))", "((q_dot, k),)"),
    "v_dot term forgotten": ("[] if v_dot is None else [p @ v_dot]", "[]"),
    "tangent_start off by one": ("split = min(max(a, start), b)", "split = min(max(a, start - 1), b)"),
    "lse without the maximum": ("lse = scores.logsumexp(dim=-1)", "lse = scores.exp().sum(dim=-1)"),
}


def mask_is_wrong(module) -> bool:
    shape = {"num_frames": 7, "tokens_per_frame": 2}
    for window, sinks in ((None, 0), (1, 1), (2, 2)):
        reach = {**shape, "window": window, "sinks": sinks}
        pattern = BlockPattern(3, 2)
        pairs = [
            (module.BlockCausal(pattern, q_block_offset=1, **reach), mask_oracle.block_causal(first=3, chunk=2, q_block_offset=1, **reach)),
            (module.TeacherForcing(pattern, **reach), mask_oracle.teacher_forcing(first=3, chunk=2, **reach)),
        ]
        for mask, truth in pairs:
            segments = [mask_oracle.from_intervals(mask.row_segments(), q_len=mask.q_len, kv_len=mask.kv_len), mask.dense()]
            tiles = mask.kv_intervals(5)
            unions = mask_oracle.from_intervals([(t.q_start, t.q_stop, t.union) for t in tiles], q_len=mask.q_len, kv_len=mask.kv_len)
            commons = mask_oracle.from_intervals([(t.q_start, t.q_stop, t.common) for t in tiles], q_len=mask.q_len, kv_len=mask.kv_len)
            rows = [slice(t.q_start, t.q_stop) for t in tiles]
            tiles_hold = all(torch.equal(unions[r.start], truth[r].any(0)) and torch.equal(commons[r.start], truth[r].all(0)) for r in rows)
            if not tiles_hold or not all(torch.equal(face, truth) for face in segments):
                return True
    return False


def reference_error(module) -> float:
    mask = masks.TeacherForcing(BlockPattern(1, 2), 5, 3)
    inputs = attention_oracle.random_inputs(q_len=mask.q_len, kv_len=mask.kv_len, tangent_start=17)
    problem = check_problem(**inputs, mask=mask, scale=0.3, tangent_start=17)
    truth = attention_oracle.forward_mode(inputs, mask=mask, scale=0.3)
    try:
        return max(attention_oracle.relative_error(a, b) for a, b in zip(module.reference_jvp(problem), truth, strict=True))
    except RuntimeError:
        return float("inf")  # a mutant whose shapes no longer fit is noticed as well


def test_the_originals_pass():
    assert not mask_is_wrong(masks)
    assert reference_error(reference) < 1e-12


@pytest.mark.parametrize("name", MASK_MUTANTS)
def test_mask_mutants_are_caught(name, tmp_path):
    old, new = MASK_MUTANTS[name]
    assert mask_is_wrong(mutants.load(masks, old=old, new=new, folder=tmp_path))


@pytest.mark.parametrize("name", REFERENCE_MUTANTS)
def test_reference_mutants_are_caught(name, tmp_path):
    old, new = REFERENCE_MUTANTS[name]
    assert reference_error(mutants.load(reference, old=old, new=new, folder=tmp_path)) > 1e-3
