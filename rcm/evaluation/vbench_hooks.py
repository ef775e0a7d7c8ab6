"""VisionReward beside VBench: the list of videos its script is given, the command, and its scores
once they are there.

VisionReward (arXiv 2412.21059) asks a vision-language model 29 yes/no questions of a video's frames
and weighs the answers; model and script are the user's own.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError

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
    words = shlex.split(template)
    for name, value in filled.items():
        words = [word.replace(name, value) for word in words]
    return words


def read_vision_reward(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean score, number of videos and standard error of `vision_reward_scores.json`.

    Raises `ConfigError` for videos of `rows` (the entries of vbench_eval_info.json) without a
    score, scored twice or with no finite number, naming the first: their mean would be of other
    videos than it says.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))["video_results"]
        scores = [(Path(entry["video_path"]).name, float(entry["score"])) for entry in given]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a list of VisionReward scores (video_results with video_path and"
            f" score): {error!r}"
        ) from error
    wanted = [Path(name).name for row in rows for name in row["video_list"]]
    by_name = dict(scores)
    twice = (
        [name for name, _ in scores if [n for n, _ in scores].count(name) > 1]
        if len(by_name) < len(scores)
        else []
    )
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
