"""Image to video in 1 to 4 steps with the two rCM experts of Wan2.2 I2V-A14B.

    python -m rcm.inference.wan2pt2_i2v_rcm_infer --image_path first.png --prompt "..." \\
        --adaptive_resolution
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rcm.inference.wan_command import Job, wan_main
from rcm.inference.wan_flags import (
    FOLDER,
    add_expert_flags,
    add_few_step_flags,
    add_image_flags,
    add_machine_flags,
    add_video_flags,
    experts,
    wan_parser,
)
from rcm.pipelines.text_to_video import WholeVideoRecipe


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = wan_parser("wan2pt2_i2v_rcm_infer", about=__doc__)
    add_video_flags(parser, sizes=("A14B",), resolution="720p", prompt=None)
    add_image_flags(parser)
    add_few_step_flags(parser, sigma_max=200.0)
    parser.add_argument(
        "--ode",
        action="store_true",
        help="deterministic steps: sharper, less robust than renoising",
    )
    add_expert_flags(
        parser,
        high=f"{FOLDER}/Wan2.2-I2V-A14B-high-rCM-merged.pth",
        low=f"{FOLDER}/Wan2.2-I2V-A14B-low-rCM-merged.pth",
    )
    add_machine_flags(parser)
    return wan_main(parser, argv, _job)


def _job(flags: argparse.Namespace) -> Job:
    solver = "euler" if flags.ode else "consistency"
    recipe = WholeVideoRecipe(
        "rcm_few_step", sigma_max=flags.sigma_max, steps=flags.num_steps, solver=solver
    )
    return Job("rcm", recipe, experts(flags), image_path=flags.image_path)


if __name__ == "__main__":
    sys.exit(main())
