"""What each stage of the demo has to reach. A gate is one sentence and one comparison of scores;
all limits stand here.

Limits leave room for another machine's arithmetic: they are set below what the run in the README
reached.
"""

from __future__ import annotations

from collections.abc import Mapping

Key = tuple[str, str]


Scores = Mapping[str, float]
"""Of one stage with one sampler, by column name."""
TEACHER_SCORE, TEACHER_CAPTIONS = 80.0, 0.8
"""Two runs that differ by the rounding of their data alone part after 1,500 iterations, and end at
83.8 and 95.0.
"""
CAUSAL_TEACHER_SHARE = 0.9
CONSISTENCY_SHARE = 0.8
SELF_FORCED_START = {"c1-1": "tf_dcm", "c3-3": "tf_scm"}
"""What SF-DMD starts from, as in the paper's best rows (docs/reference/training.md#experiments)."""
SELF_FORCED_MARGIN = 3.0
SELF_FORCED_CAPTIONS = 0.8


def judge(name: str, scores: Mapping[Key, Scores]) -> tuple[str, bool]:
    """(sentence, passed) of stage `name`, from the scores of all stages."""
    if name == "bidirectional":
        mine = scores[name, "many steps"]
        return (
            (
                f"score {mine['score']:.1f} >= {TEACHER_SCORE:g} and caption accuracy"
                f" {mine['joint']:.2f} >= {TEACHER_CAPTIONS:g}"
            ),
            mine["score"] >= TEACHER_SCORE and mine["joint"] >= TEACHER_CAPTIONS,
        )
    kind, pattern = name.rsplit("_", 1)
    if kind == "tf":
        return _share(
            scores[name, "many steps"],
            scores["bidirectional", "many steps"],
            CAUSAL_TEACHER_SHARE,
            "the whole-video teacher's",
        )
    if kind in ("tf_dcm", "tf_scm"):
        return _share(
            scores[name, "2 steps"],
            scores[f"tf_{pattern}", "many steps"],
            CONSISTENCY_SHARE,
            "the causal teacher's",
        )
    return _not_worse(
        scores[name, "2 steps"], scores[f"{SELF_FORCED_START[pattern]}_{pattern}", "2 steps"]
    )


def _share(mine: Scores, other: Scores, share: float, whose: str) -> tuple[str, bool]:
    limit = share * other["score"]
    return (
        f"score {mine['score']:.1f} >= {limit:.1f} = {share:g} x {whose} {other['score']:.1f}",
        mine["score"] >= limit,
    )


def _not_worse(mine: Scores, start: Scores) -> tuple[str, bool]:
    sentence = (
        f"2-step score {mine['score']:.1f} >= {start['score']:.1f} of its initialisation -"
        f" {SELF_FORCED_MARGIN:g}, and caption accuracy {mine['joint']:.2f} >="
        f" {SELF_FORCED_CAPTIONS:g}"
    )
    return (
        sentence,
        mine["score"] >= start["score"] - SELF_FORCED_MARGIN
        and mine["joint"] >= SELF_FORCED_CAPTIONS,
    )
