"""The demo's gates: each passes at its limit and fails just below it, for every score named."""

from __future__ import annotations

import pytest

from scripts.demo_gates import Scores, judge

GATES = {  # stage -> scores of others, its own sampler, (score, captions) at the limit, what is too little
    "bidirectional": ({}, "many steps", (80.0, 0.8), [(79.99, 1.0), (100.0, 0.79)]),
    "tf_c1-1": ({("bidirectional", "many steps"): (90.0, 1.0)}, "many steps", (81.0, 0.0), [(80.99, 1.0)]),
    "tf_c3-3": ({("bidirectional", "many steps"): (80.0, 1.0)}, "many steps", (72.0, 0.0), [(71.99, 1.0)]),
    "tf_dcm_c1-1": ({("tf_c1-1", "many steps"): (90.0, 1.0)}, "2 steps", (72.0, 0.0), [(71.99, 1.0)]),
    "tf_scm_c3-3": ({("tf_c3-3", "many steps"): (80.0, 1.0)}, "2 steps", (64.0, 0.0), [(63.99, 1.0)]),
    "sf_dmd_c1-1": ({("tf_dcm_c1-1", "2 steps"): (90.0, 1.0)}, "2 steps", (87.0, 0.8), [(86.99, 1.0), (100.0, 0.79)]),
    "sf_dmd_c3-3": ({("tf_scm_c3-3", "2 steps"): (80.0, 1.0)}, "2 steps", (77.0, 0.8), [(76.99, 1.0), (100.0, 0.79)]),
}


def scored(score: float, captions: float) -> Scores:
    return {"score": score, "joint": captions}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_passes_at_its_limit_and_not_below(name: str) -> None:
    others, sampler, limit, short = GATES[name]
    known = {key: scored(*pair) for key, pair in others.items()}
    sentence, passed = judge(name, known | {(name, sampler): scored(*limit)})
    assert passed and f"{limit[0]:.1f} >= " in sentence
    assert not any(judge(name, known | {(name, sampler): scored(*pair)})[1] for pair in short)
