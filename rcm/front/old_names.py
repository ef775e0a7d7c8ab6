"""The files under `evaluation/`, by which the release's users call the VBench suites: each runs a
command of `rcm`, or names it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rcm.front import cli

I2V_DIMENSIONS = ("i2v_subject", "i2v_background", "camera_motion")
OLD: Mapping[str, tuple[str, ...] | str] = {
    "vbench_text2video/sample_videos.py": ("vbench", "sample"),
    "vbench_text2video/cal_scores.py": ("vbench", "score"),
    "vbench_text2video/eval_vision_reward.py": (
        'rcm vbench score --videos_path DIR --vision_reward "python SCRIPT --eval_info {eval_info}'
        ' --output {output} --model_path {model}", with your VisionReward script'
    ),
    "vbench_i2v/sample_videos_i2v.py": ("vbench", "sample", "--suite", "i2v"),
    "vbench_i2v/cal_scores_i2v.py": ("vbench", "score", "--suite", "i2v"),
    "vbench_i2v/eval_i2v_dims.py": (
        "vbench",
        "score",
        "--suite",
        "i2v",
        "--partial",
        "--dimension",
        *I2V_DIMENSIONS,
    ),
}
"""File -> words after `rcm` before the user's own (a flag given again replaces its value), or the
command that took its place.
"""


def main(file: str) -> int:
    """Entry point of the old name `file`; returns the exit status, 2 for a name that only tells of
    the new command.
    """
    words = sys.argv[1:]
    name = "/".join(Path(file).parts[-2:])
    asked, now = not {"-h", "--help"}.isdisjoint(words), OLD[name]
    if isinstance(now, str):
        print(
            f"{'' if asked else 'error: '}evaluation/{name} is now {now}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    if asked:
        print(f"evaluation/{name} runs: rcm {' '.join(now)} ...\n")
        return cli.main([*now[:2], "--help"])
    return cli.main([*now, *words])
