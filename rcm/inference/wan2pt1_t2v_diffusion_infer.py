"""Text to video with Wan2.1 itself, the many-step teacher, with guidance.

    python -m rcm.inference.wan2pt1_t2v_diffusion_infer --model_size 1.3B --num_samples 1 \\
        --dit_path assets/checkpoints/Wan2.1-T2V-1.3B.pth
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rcm.inference.wan_command import Job, wan_main
from rcm.inference.wan_flags import (
    FOLDER,
    add_machine_flags,
    add_many_step_flags,
    add_single_network_flags,
    add_video_flags,
    many_step_recipe,
    single_network,
    wan_parser,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = wan_parser("wan2pt1_t2v_diffusion_infer", about=__doc__)
    add_video_flags(parser, size="14B", num_samples=4)
    add_many_step_flags(parser)
    add_single_network_flags(parser, dit_path=f"{FOLDER}/Wan2.1-T2V-14B.pth")
    add_machine_flags(parser)
    return wan_main(parser, argv, _job)


def _job(flags: argparse.Namespace) -> Job:
    return Job(
        "diffusion",
        many_step_recipe(flags),
        single_network(flags),
        negative_prompt=flags.negative_prompt,
    )


if __name__ == "__main__":
    sys.exit(main())
