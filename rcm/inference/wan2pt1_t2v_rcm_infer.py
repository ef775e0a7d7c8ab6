"""Text to video in 1 to 4 steps with a bidirectional rCM student of Wan2.1.

    python -m rcm.inference.wan2pt1_t2v_rcm_infer --prompt "..." \\
        --dit_path assets/checkpoints/rCM_Wan2.1_T2V_1.3B_480p.pt
    torchrun --nproc_per_node=4 -m rcm.inference.wan2pt1_t2v_rcm_infer --prompt "..." \\
        --model_size 14B --resolution 720p --sigma_max 120 --dit_path FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rcm.inference.wan_command import Job, wan_main
from rcm.inference.wan_flags import (
    add_few_step_flags,
    add_machine_flags,
    add_single_network_flags,
    add_video_flags,
    single_network,
    wan_parser,
)
from rcm.pipelines.text_to_video import WholeVideoRecipe


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = wan_parser("wan2pt1_t2v_rcm_infer", about=__doc__)
    add_video_flags(parser, num_frames=77)
    add_few_step_flags(parser, sigma_max=80.0)
    add_single_network_flags(parser, dit_path="")
    add_machine_flags(parser)
    return wan_main(parser, argv, _job)


def _job(flags: argparse.Namespace) -> Job:
    return Job(
        "rcm",
        WholeVideoRecipe("rcm_few_step", sigma_max=flags.sigma_max, steps=flags.num_steps),
        single_network(flags),
    )


if __name__ == "__main__":
    sys.exit(main())
