"""Flags of `scripts.vbench_sample` that say which model is sampled and how, and what they mean for
a Wan file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rcm.core.arguments import Arguments
from rcm.inference import checkpoint_flags
from rcm.inference.flag_table import add_flags
from rcm.inference.stream_recipe import (
    CONTEXT,
    EITHER,
    FEW,
    KINDS,
    MANY,
    check_pairs,
    laid_over,
    laid_over_whole,
    refuse,
)
from rcm.inference.wan_flags import PRECISIONS, TEXT_ENCODER_PATH, VAE_PATH, unguided
from rcm.inference.wan_models import VAE_DTYPES
from rcm.nets.attention import BACKENDS
from rcm.pipelines.text_to_video import WholeVideoRecipe
from rcm.pipelines.wan_sizes import SIZES
from rcm.rollout.recipe import SamplingRecipe
from rcm.train.export import describe

FEW_STEPS, MANY_STEPS = 4, 50

_MODEL = f"""
dit_path PATH          job folder, iter_* folder or exported file of this package, or a Wan file
arch bidirectional|causal  of a Wan file [told by the checkpoint where it describes itself]
model_size 1.3B|14B|auto = 1.3B  of a Wan file [%(default)s]
weights = ema          averaged or last weights [%(default)s]
vae_path               [where the checkpoint says, else {VAE_PATH}]
text_encoder_path      [where the checkpoint says, else {TEXT_ENCODER_PATH}]
tokenizer_path         [beside the text encoder]
text_cache             keep umT5's embeddings there
"""
_VIDEO = f"""
num_frames N           pixel frames [as trained; Wan 81]
resolution str = 480p  of a Wan file: {", ".join(SIZES)} [%(default)s]
aspect_ratio W:H = 16:9  [%(default)s]
size HxW               pixels instead of the table (an addition)
fps                    frames per second of the files; dynamic_degree looks at it
  [as trained; Wan 16]
"""
_SAMPLING = f"""
distilled              Wan file: few steps, no guidance
num_steps              [as trained; Wan {FEW_STEPS} distilled, else {MANY_STEPS}]
sigma_max              noise level of the first step [as trained; Wan 1600]
mid_t                  causal: mid times, fractions allowed [15/16 5/6 5/8]
steps_per_chunk        causal: steps of each chunk, the last number repeats
mid_t_schedules        causal: mid times per entry of --steps_per_chunk
guidance_scale         without --distilled [as trained; Wan 5]
negative_prompt        [Wan's own]
timestep_shift         without --distilled [as trained; Wan 5]
first_chunk_t          causal Wan file: latent frames of the first chunk [1]
chunk_t                causal Wan file: of later chunks [1]
context_from_last_step  causal: noisy context
context_from_last_step_start_chunk  causal: first chunk cached with it [0]
ignore_recipe          sample even where the checkpoint was not trained for it
"""
_MACHINE = f"""
cp_size N = 1          ranks that make one video together; other groups take other prompts [1]
device                 [%(default)s]
precision str          [that of the training run; Wan fast of {", ".join(PRECISIONS)}]
vae_precision {"|".join(VAE_DTYPES)} = bf16  [%(default)s]
attention {"|".join(BACKENDS)} = auto  [%(default)s]
"""


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the model and of its sampling, under the names of the release. None: as trained, or
    the release's default.
    """
    group = parser.add_argument_group
    add_flags(group("model"), _MODEL, checkpoint_flags.KINDS, dit_path={"required": True})
    add_flags(group("video"), _VIDEO, checkpoint_flags.KINDS)
    add_flags(group("sampling"), _SAMPLING, KINDS, context_from_last_step=EITHER)
    add_flags(group("machine"), _MACHINE, checkpoint_flags.KINDS, device=checkpoint_flags.HERE)


def refuse_idle(parser: Arguments) -> None:
    """What says nothing of the model at hand; the crops of images have an aspect ratio, too."""
    parser.idle("resolution", beside="size")
    parser.idle(
        "aspect_ratio", beside="size", when=lambda flags: flags.size and flags.suite == "t2v"
    )
    unguided(parser)

    def described(flags: argparse.Namespace) -> bool:
        return describes_itself(flags.dit_path)

    parser.idle("model_size", "resolution", "vae_precision", beside="dit_path", when=described)
    parser.idle(
        "aspect_ratio",
        beside="dit_path",
        when=lambda flags: flags.suite == "t2v" and described(flags),
    )


def output_name(flags: argparse.Namespace) -> str:
    """Name of the folder of videos when none is given. Step schedules are not in it; runs that
    differ in them need --output_dir.
    """
    stem = (
        Path(flags.dit_path).stem if Path(flags.dit_path).is_file() else Path(flags.dit_path).name
    )
    if describes_itself(flags.dit_path):
        how = "as_trained" if flags.num_steps is None else f"{flags.num_steps}steps"
    elif flags.distilled:
        how = f"distilled_{given_or(flags.num_steps, FEW_STEPS)}steps"
    else:
        shift, steps = given_or(flags.timestep_shift, 5.0), given_or(flags.num_steps, MANY_STEPS)
        how = f"cfg{given_or(flags.guidance_scale, 5.0)}_shift{shift}_{steps}steps"
    arch = "i2v" if flags.suite == "i2v" else flags.arch or "described"
    return f"videos_{arch}_{how}_{stem}_seed{flags.seed}"


def describes_itself(path: str) -> bool:
    found = describe(path) if Path(path).exists() else None
    return found is not None and bool(found.extra.get("recipe") or found.extra.get("sampler"))


def whole_recipe(flags: argparse.Namespace) -> WholeVideoRecipe:
    """How a bidirectional Wan file is sampled."""
    base = WholeVideoRecipe("ode", 1600.0, MANY_STEPS, shift=5.0, guidance=5.0, solver="euler")
    if flags.distilled:
        refuse(flags, MANY, _IDLE)
        base = WholeVideoRecipe("rcm_few_step", 1600.0, FEW_STEPS)
    return laid_over_whole(flags, base)


def causal_recipe(flags: argparse.Namespace) -> SamplingRecipe:
    """How a causal Wan file is sampled."""
    pattern = f"c{given_or(flags.first_chunk_t, 1)}-{given_or(flags.chunk_t, 1)}"
    base = SamplingRecipe("ode", pattern, ode_steps=MANY_STEPS, shift=5.0, guidance=5.0)
    if flags.distilled:
        refuse(flags, MANY, _IDLE)
        base = SamplingRecipe("few_step", pattern)
    else:
        refuse(flags, (*FEW, *CONTEXT), "belong to few-step sampling; add --distilled")
    check_pairs(flags)
    return laid_over(flags, base)


_IDLE = "belong to sampling without --distilled; leave them out"


def given_or(value: Any, default: Any) -> Any:
    """A flag's value, or what it means when it is not given."""
    return default if value is None else value
