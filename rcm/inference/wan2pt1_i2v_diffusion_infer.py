"""Image to video with Wan2.1 I2V-14B, or from a first and a last frame with Wan2.1 FLF2V-14B, in
many steps, with guidance.

    python -m rcm.inference.wan2pt1_i2v_diffusion_infer --dit_path FOLDER --prompt "..." \\
        --image_path first.png
    python -m rcm.inference.wan2pt1_i2v_diffusion_infer --dit_path FOLDER --prompt "..." \\
        --image_path first.png --last_image_path last.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rcm.core.errors import ConfigError
from rcm.encoders.clip_vision import CLIP_FILE
from rcm.encoders.prompt_cleaning import NEGATIVE_PROMPT_FLF2V, NEGATIVE_PROMPT_I2V
from rcm.inference.flag_table import add_flags
from rcm.inference.wan_command import Job, wan_main
from rcm.inference.wan_flags import (
    add_image_flags,
    add_machine_flags,
    add_many_step_flags,
    add_single_network_flags,
    add_video_flags,
    many_step_recipe,
    single_network,
    wan_parser,
)
from rcm.pipelines.image_condition import MASK_CHANNELS

_IMAGES = f"""
last_image_path FILE  the last frame, stretched to the size of the video as the first is (FLF2V)
clip_path PATH = {CLIP_FILE}  weights of CLIP's image half [%(default)s]
"""
SHIFTS = {"one": 5.0, "two": 16.0}
"""Shift of the times as the original samples with one image and with two; 3 for one at 480p."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = wan_parser("wan2pt1_i2v_diffusion_infer", about=__doc__)
    add_video_flags(parser, sizes=("i2v-14B", "flf2v-14B"), size="auto", resolution="720p")
    add_image_flags(parser, experts=False)
    add_flags(parser.add_argument_group("more of the image"), _IMAGES)
    add_many_step_flags(parser, negative_prompt=None, timestep_shift=None)
    add_single_network_flags(parser, dit_path="")
    add_machine_flags(parser)
    return wan_main(parser, argv, _job)


def _job(flags: argparse.Namespace) -> Job:
    two = flags.last_image_path is not None
    if two and flags.num_frames <= MASK_CHANNELS:
        raise ConfigError(
            f"a first and a last frame need at least {1 + MASK_CHANNELS} frames, got"
            f" {flags.num_frames}; change --num_frames"
        )
    if flags.timestep_shift is None:
        flags.timestep_shift = SHIFTS["two" if two else "one"]
    if flags.negative_prompt is None:
        flags.negative_prompt = NEGATIVE_PROMPT_FLF2V if two else NEGATIVE_PROMPT_I2V
    return Job(
        "diffusion i2v",
        many_step_recipe(flags),
        single_network(flags),
        negative_prompt=flags.negative_prompt,
        image_path=flags.image_path,
        last_image_path=flags.last_image_path,
        clip_path=flags.clip_path,
    )


if __name__ == "__main__":
    sys.exit(main())
