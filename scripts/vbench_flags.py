"""Flags of `scripts.vbench_sample` that say which model is sampled and how, and what they mean for
a Wan file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rcm.core.errors import ConfigError
from rcm.inference.wan_flags import PRECISIONS, TEXT_ENCODER_PATH, VAE_PATH
from rcm.inference.wan_models import VAE_DTYPES
from rcm.nets.attention import BACKENDS
from rcm.pipelines.text_to_video import WholeVideoRecipe, check_guided
from rcm.pipelines.wan_sizes import SIZES
from rcm.rollout.plan import StepSchedule
from rcm.rollout.recipe import SamplingRecipe
from rcm.samplers.schedule import CAUSAL_MID_TIMES, parse_schedules, parse_times
from rcm.train.export import describe

FEW_STEPS, MANY_STEPS = 4, 50
FEW_STEP_FLAGS = ("steps_per_chunk", "mid_t", "mid_t_schedules", "context_from_last_step")
FEW_STEP_FLAGS += ("context_from_last_step_start_chunk",)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the model and of its sampling, under the names of the release. None: as trained, or
    the release's default.
    """
    add = parser.add_argument_group("model").add_argument
    add(
        "--dit_path",
        required=True,
        metavar="PATH",
        help="job folder, iter_* folder or exported file of this package, or a Wan file",
    )
    add(
        "--arch",
        choices=("bidirectional", "causal"),
        help="of a Wan file [told by the checkpoint where it describes itself]",
    )
    add(
        "--model_size",
        choices=("1.3B", "14B", "auto"),
        default="1.3B",
        help="of a Wan file [%(default)s]",
    )
    add(
        "--weights",
        choices=("ema", "reg"),
        default="ema",
        help="averaged or last weights [%(default)s]",
    )
    add("--vae_path", metavar="PATH", help=f"[where the checkpoint says, else {VAE_PATH}]")
    add(
        "--text_encoder_path",
        metavar="PATH",
        help=f"[where the checkpoint says, else {TEXT_ENCODER_PATH}]",
    )
    add("--tokenizer_path", metavar="DIR", help="[beside the text encoder]")
    add("--text_cache", metavar="DIR", help="keep umT5's embeddings there")
    add = parser.add_argument_group("video").add_argument
    add("--num_frames", type=int, metavar="N", help="pixel frames [as trained; Wan 81]")
    add("--resolution", default="480p", help=f"of a Wan file: {', '.join(SIZES)} [%(default)s]")
    add("--aspect_ratio", default="16:9", metavar="W:H", help="[%(default)s]")
    add("--size", metavar="HxW", help="pixels instead of the table (an addition)")
    add(
        "--fps",
        type=float,
        help="frames per second of the files; dynamic_degree looks at it [as trained; Wan 16]",
    )
    add = parser.add_argument_group("sampling").add_argument
    add("--distilled", action="store_true", help="Wan file: few steps, no guidance")
    add(
        "--num_steps",
        type=int,
        metavar="N",
        help=f"[as trained; Wan {FEW_STEPS} distilled, else {MANY_STEPS}]",
    )
    add("--sigma_max", type=float, help="noise level of the first step [as trained; Wan 1600]")
    add(
        "--mid_t",
        nargs="+",
        metavar="T",
        help="causal: mid times, fractions allowed [15/16 5/6 5/8]",
    )
    add(
        "--steps_per_chunk",
        type=int,
        nargs="+",
        metavar="N",
        help="causal: steps of each chunk, the last number repeats",
    )
    add(
        "--mid_t_schedules",
        metavar="T,T;T",
        help="causal: mid times per entry of --steps_per_chunk",
    )
    add("--guidance_scale", type=float, help="without --distilled [as trained; Wan 5]")
    add("--negative_prompt", metavar="TEXT", help="[Wan's own]")
    add("--timestep_shift", type=float, help="without --distilled [as trained; Wan 5]")
    add(
        "--first_chunk_t",
        type=int,
        metavar="N",
        help="causal Wan file: latent frames of the first chunk [1]",
    )
    add("--chunk_t", type=int, metavar="N", help="causal Wan file: of later chunks [1]")
    add(
        "--context_from_last_step",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="causal: noisy context",
    )
    add(
        "--context_from_last_step_start_chunk",
        type=int,
        metavar="N",
        help="causal: first chunk that leaves it [0]",
    )
    add(
        "--ignore_recipe",
        action="store_true",
        help="sample even where the checkpoint was not trained for it",
    )
    add = parser.add_argument_group("machine").add_argument
    add(
        "--cp_size",
        type=int,
        default=1,
        metavar="N",
        help="ranks that make one video together; other groups take other prompts [1]",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--precision", help=f"[that of the training run; Wan fast of {', '.join(PRECISIONS)}]")
    add("--vae_precision", choices=tuple(VAE_DTYPES), default="bf16", help="[%(default)s]")
    add("--attention", choices=tuple(BACKENDS), default="auto", help="[%(default)s]")


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


def refuse(flags: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """`ConfigError` "--a, --b WHY" for those of `names` that were given."""
    given = [f"--{name}" for name in names if getattr(flags, name) not in (None, False)]
    if given:
        raise ConfigError(f"{', '.join(given)} {why}")


def whole_recipe(flags: argparse.Namespace) -> WholeVideoRecipe:
    sigma = given_or(flags.sigma_max, 1600.0)
    if flags.distilled:
        _refuse_guidance(flags)
        return WholeVideoRecipe(
            "rcm_few_step", sigma_max=sigma, steps=given_or(flags.num_steps, FEW_STEPS)
        )
    shift, guidance = given_or(flags.timestep_shift, 5.0), given_or(flags.guidance_scale, 5.0)
    check_guided(shift=shift, guidance=guidance)
    return WholeVideoRecipe(
        "ode",
        sigma_max=sigma,
        steps=given_or(flags.num_steps, MANY_STEPS),
        shift=shift,
        guidance=guidance,
        solver="euler",
    )


def causal_recipe(flags: argparse.Namespace) -> SamplingRecipe:
    first, later = given_or(flags.first_chunk_t, 1), given_or(flags.chunk_t, 1)
    pattern, sigma = f"c{first}-{later}", given_or(flags.sigma_max, 1600.0)
    if not flags.distilled:
        refuse(flags, FEW_STEP_FLAGS, "belong to few-step sampling; add --distilled")
        shift, guidance = given_or(flags.timestep_shift, 5.0), given_or(flags.guidance_scale, 5.0)
        check_guided(shift=shift, guidance=guidance)
        steps = given_or(flags.num_steps, MANY_STEPS)
        return SamplingRecipe(
            "ode", pattern, sigma_max=sigma, ode_steps=steps, shift=shift, guidance=guidance
        )
    _refuse_guidance(flags)
    if flags.mid_t_schedules is not None and flags.steps_per_chunk is None:
        raise ConfigError(
            "--mid_t_schedules needs --steps_per_chunk with one step count per schedule"
        )
    if flags.num_steps is not None and flags.steps_per_chunk is not None:
        raise ConfigError(
            "--num_steps and --steps_per_chunk both set the number of steps; give one of them"
        )
    start = flags.context_from_last_step_start_chunk
    if start is not None and not flags.context_from_last_step:
        raise ConfigError(
            "--context_from_last_step_start_chunk has no effect with clean context; add"
            " --context_from_last_step"
        )
    steps: Sequence[int] = flags.steps_per_chunk or [given_or(flags.num_steps, FEW_STEPS)]
    schedule = StepSchedule.from_lists(
        steps=steps,
        schedules=() if flags.mid_t_schedules is None else parse_schedules(flags.mid_t_schedules),
        default_mids=CAUSAL_MID_TIMES if flags.mid_t is None else parse_times(flags.mid_t),
        knob="--steps_per_chunk" if flags.steps_per_chunk else "--num_steps",
    )
    return SamplingRecipe(
        "few_step",
        pattern,
        mids=schedule.mids,
        sigma_max=sigma,
        noisy_context=bool(flags.context_from_last_step),
        noisy_context_start_chunk=start or 0,
    )


def _refuse_guidance(flags: argparse.Namespace) -> None:
    names = ("guidance_scale", "timestep_shift", "negative_prompt")
    refuse(flags, names, "belong to sampling without --distilled; leave them out")


def given_or(value: Any, default: Any) -> Any:
    """A flag's value, or what it means when it is not given."""
    return default if value is None else value
