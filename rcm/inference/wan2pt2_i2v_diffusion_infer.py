"""Image to video with the two experts of Wan2.2 I2V-A14B, the many-step teacher, with guidance.

    python -m rcm.inference.wan2pt2_i2v_diffusion_infer --image_path first.png --prompt "..." \\
        --num_samples 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rcm.inference.wan_command import Job, wan_main
from rcm.inference.wan_flags import (
    FOLDER,
    add_expert_flags,
    add_image_flags,
    add_machine_flags,
    add_many_step_flags,
    add_video_flags,
    experts,
    many_step_recipe,
    wan_parser,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = wan_parser("wan2pt2_i2v_diffusion_infer", about=__doc__)
    add_video_flags(parser, sizes=("A14B",), num_samples=4, resolution="720p")
    add_image_flags(parser)
    add_many_step_flags(parser)
    add_expert_flags(
        parser, high=f"{FOLDER}/Wan2.2-I2V-A14B-high.pth", low=f"{FOLDER}/Wan2.2-I2V-A14B-low.pth"
    )
    add_machine_flags(parser)
    return wan_main(parser, argv, _job)


def _job(flags: argparse.Namespace) -> Job:
    return Job(
        "diffusion",
        many_step_recipe(flags),
        experts(flags),
        negative_prompt=flags.negative_prompt,
        image_path=flags.image_path,
    )


if __name__ == "__main__":
    sys.exit(main())
