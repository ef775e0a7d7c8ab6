"""VisionReward beside VBench: the command that is given its videos, and its scores.

It asks a vision-language model 29 yes/no questions of a video and weighs the answers (arXiv
2412.21059); model and script are the user's own.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_results import read_json

MODEL = "THUDM/VisionReward-Video"
SCORES = "vision_reward_scores.json"


def vision_reward_command(
    template: str, *, eval_info: Path, output: Path, model: str = MODEL
) -> list[str]:
    """The words of the user's command: `{eval_info}`, `{output}` and `{model}` in `template` are
    filled in. `ConfigError` where it does not say what to read and where to write.
    """
    missing = [name for name in ("{eval_info}", "{output}") if name not in template]
    if missing:
        raise ConfigError(
            f"the command of VisionReward must contain {' and '.join(missing)}, got {template!r}"
        )
    filled = {"{eval_info}": str(eval_info), "{output}": str(output), "{model}": model}
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ConfigError(
            f"the command of VisionReward is cut off: {error}: {template!r}"
        ) from error
    for name, value in filled.items():
        words = [word.replace(name, value) for word in words]
    return words


def read_vision_reward(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean score, number of videos and standard error of `vision_reward_scores.json`.

    `ConfigError` for videos of `rows` (of vbench_eval_info.json) without one finite score.
    """
    try:
        given = read_json(path, what="file of VisionReward scores")["video_results"]
        scores = [(Path(entry["video_path"]).name, float(entry["score"])) for entry in given]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{path} is not a list of VisionReward scores (video_results with video_path and"
            f" score): {error!r}"
        ) from error
    wanted = [Path(name).name for row in rows for name in row["video_list"]]
    by_name = dict(scores)
    twice = [name for name, count in Counter(name for name, _ in scores).items() if count > 1]
    lost = [name for name in wanted if name not in by_name]
    bad = [name for name, score in scores if not math.isfinite(score)]
    for names, what in (
        (twice, "scored twice"),
        (lost, "without a score"),
        (bad, "scored with no finite number"),
    ):
        if names:
            raise ConfigError(f"{path}: {len(set(names))} videos {what}, the first is {names[0]!r}")
    values = [by_name[name] for name in wanted]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))
    return {"mean": mean, "standard_error": spread, "num_videos": len(values)}
